"""moestream beside llama.cpp and its relatives, on one synthetic model, on this machine, in one run.

Nothing is built here: name an existing llama-bench (``--llama-bench PATH`` or ``--llama-bench LABEL=PATH``, as often as
you like), or ``pip install xllamacpp``. Writing the peers' file needs ``pip install gguf``. As root the page cache is
dropped before every run and the disk's read-ahead can be tuned for the peers; without root both stay as they are.

    python benchmarks/peers 30b --llama-bench ~/llama.cpp/build/bin/llama-bench --llama-bench ik=~/ik/bin/llama-bench
    python benchmarks/peers 397b --llama-bench ... --read-ahead default,128
    python benchmarks/peers 397b --llama-bench ... --read-ahead default,128 --withhold 13GB
    python benchmarks/peers report runs.jsonl

The first round tries every setting of a peer, later rounds only the best one of each phase. Every run is appended to
the log, so rounds may be spread over several calls. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peer_machine as machine
from peer_report import OURS, Record, best, condition, judge, setting, summarise, table
from peer_router import ZIPF
from peer_runs import Phase, Variant, bench_command, can_repack, describe, measure, run_bench, run_child

from moestream import system
from moestream.bench.checkpoints import synthetic_folder
from moestream.checkpoint.geometry import geometry
from moestream.config import parse_size

XLLAMACPP = "xllamacpp"


@dataclass(frozen=True, slots=True)
class Case:
    """A model shape and what is timed on it; the phases of one job share a process."""

    shape: str
    layers: int | None
    in_memory: bool
    kinds: tuple[str, ...]
    jobs: tuple[tuple[Phase, ...], ...]


CASES = {
    "30b": Case(
        "qwen3-30b-a3b",
        None,
        True,
        ("q4_0", "q4_k"),
        ((Phase("prefill-512", True, 512, 1, 2), Phase("decode", False, 96, 1, 2)),),
    ),
    "397b": Case(
        "qwen3.5-397b",
        8,
        False,
        ("q4_k",),
        (
            (Phase("decode", False, 16, 10, 4),),
            (Phase("prefill-512", True, 512, 1, 2),),
            (Phase("prefill-2048", True, 2048, 1, 1),),
        ),
    ),
    "tiny": Case(
        "tiny-qwen3",
        None,
        True,
        ("q4_0",),
        ((Phase("prefill-512", True, 512, 1, 2), Phase("decode", False, 32, 1, 2)),),
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python benchmarks/peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("case", choices=[*CASES, "report"], help="what to compare; report: only print what logs hold")
    p.add_argument("logs", nargs="*", type=Path, help="with report: logs of earlier calls")
    p.add_argument(
        "--llama-bench", action="append", default=[], metavar="[LABEL=]PATH", help="a llama-bench; may be repeated"
    )
    p.add_argument("--dir", type=Path, default=Path("peers-models"), help="where the models are kept; twice the size")
    p.add_argument("--log", type=Path, default=Path("peers.jsonl"), help="every run is appended to this file")
    p.add_argument("--types", type=_words, metavar="q4_0,q4_k", help="formats of the peers; default: the case's")
    p.add_argument("--routing", choices=[*ZIPF], default="skewed", help="experts as in trained models, or all alike")
    p.add_argument("--threads", type=int, default=None, help="compute threads; default: cores we may use")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--phases", type=_words, metavar="NAMES", help="e.g. decode,prefill-512; default: all")
    p.add_argument("--withhold", type=lambda text: parse_size(text, "--withhold"), default=0, metavar="SIZE")
    p.add_argument(
        "--read-ahead", type=_words, default=["default"], metavar="KB,...", help="of the disk, for peers; needs root"
    )
    p.add_argument("--only", default="", metavar="REGEX", help="only programs and settings whose name matches")
    p.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="a program is ended after this long")
    p.add_argument("--our-ram", type=lambda text: parse_size(text, "--our-ram"), metavar="SIZE", help="default: auto")
    return p


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


class Comparison:
    """All runs of one call."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.case = args, CASES[args.case]
        self.threads = args.threads or system.cpu_count()
        self.benches = dict(self._bench(text) for text in args.llama_bench)
        self.help = {label: _help(path) for label, path in self.benches.items()}
        self.config = geometry(self.case.shape, self.case.layers)
        self.jobs = [
            phases
            for job in self.case.jobs
            if (phases := tuple(p for p in job if not args.phases or p.name in args.phases))
        ]
        self.records = read_logs([args.log]) if args.log.exists() else []

    @staticmethod
    def _bench(text: str) -> tuple[str, Path]:
        label, _, path = text.rpartition("=")
        file = Path(path).expanduser().resolve()
        if not os.access(file, os.X_OK):
            raise SystemExit(f"--llama-bench {text}: {file} is no program; build llama.cpp's target llama-bench first")
        return label or "llama.cpp", file

    def variants(self) -> list[Variant]:
        """All settings of all programs: ours is one."""
        found = [Variant(OURS, "affine-4", self.threads)]
        for kind in self.args.types or self.case.kinds:
            for label in self.benches:
                layouts = [True, False] if self.case.in_memory and can_repack(self.help[label]) else [False]
                found += [Variant(label, kind, self.threads, repack=repack) for repack in layouts]
                if not self.case.in_memory:
                    found.append(Variant(label, kind, 2 * self.threads, passive=True))
            if find_spec(XLLAMACPP):
                found.append(Variant(XLLAMACPP, kind, self.threads, repack=self.case.in_memory))
        return found

    def prepare(self) -> None:
        """Write what is missing."""
        from peer_gguf import set_routing, write_gguf  # noqa: PLC0415  # gguf is only needed here

        self.args.dir.mkdir(parents=True, exist_ok=True)
        self.folder, _ = synthetic_folder(self.case.shape, self.case.layers, self.args.dir, lambda done, total: None)
        for kind in sorted({v.kind for v in self.variants() if self.wanted(v)} - {"affine-4"}):
            path = self.model(kind)
            if not path.exists():
                print(f"writing {path}; delete --dir when you are done", file=sys.stderr)
                write_gguf(path, self.case.shape, self.case.layers, kind, self.args.routing)
            else:
                set_routing(path, self.case.shape, self.case.layers, kind, self.args.routing)

    def wanted(self, variant: Variant) -> bool:
        """Whether ``--only`` lets it pass."""
        return re.search(self.args.only, f"{variant.engine} {variant.name}") is not None

    def model(self, kind: str) -> Path:
        """The peers' file."""
        return (self.args.dir / f"{self.folder.name}-{kind}.gguf").resolve()

    def checkpoint_file(self) -> Path:
        """Our largest file."""
        return max(self.folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)

    def plan(self, number: int) -> Iterator[tuple[Variant, tuple[Phase, ...], str]]:
        """What to run in one round; every second one backwards. Ours gets no tuned read-ahead: it needs none."""
        runs = [
            (variant, phases, ahead)
            for phases in self.jobs
            for variant in self.variants()
            for ahead in (["default"] if variant.engine == OURS else self.args.read_ahead)
            if self.wanted(variant)
        ]
        fastest = set(best(self.records).values())
        tried = {(condition(record), setting(record)) for record in self.records}
        for variant, phases, ahead in runs if number % 2 else reversed(runs):
            names = [self._blank(variant, phase, ahead) for phase in phases]
            fresh = any((condition(name), setting(name)) not in tried for name in names)
            if fresh or variant.engine == OURS or any(setting(name) in fastest for name in names):
                yield variant, phases, ahead

    def _blank(self, variant: Variant, phase: Phase, ahead: str) -> Record:
        """A record without results."""
        return {
            "case": self.args.case,
            "routing": self.args.routing,
            "withheld": self.args.withhold,
            "read_ahead": ahead,
            "tuned": ahead != "default",
            **describe(phase, variant),
        }

    def run(self, number: int, variant: Variant, phases: tuple[Phase, ...], ahead: str) -> None:
        """One run with the ceilings before and after it, recorded phase by phase."""
        ours = variant.engine == OURS
        file = self.checkpoint_file() if ours else self.model(variant.kind)
        machine.drop_caches()
        kb = None if ahead == "default" else int(ahead)
        with machine.read_ahead(file, kb) as holds, machine.withhold(self.args.withhold):
            before = machine.ceilings(file, self.threads)
            finished = self._start(variant, phases, file)
            limits = machine.mean([before, machine.ceilings(file, self.threads)])
        for phase in phases:
            record = self._blank(variant, phase, ahead) | measure(finished, phase)
            record |= {"round": number, "read_ahead_kb": holds, "wall_seconds": finished.seconds}
            record |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
            record |= {"ceilings": asdict(limits), "program": finished.facts}
            self._judge(record, variant, phase, finished.facts)
            self.records.append(record)
            with self.args.log.open("a") as log:
                log.write(json.dumps(record) + "\n")
            shown = f"{np.median(record['rates']):.2f} tok/s" if "rates" in record else record["error"]
            print(f"round {number}: {setting(record)}: {condition(record)}: {shown}", flush=True)

    def _start(self, variant: Variant, phases: tuple[Phase, ...], file: Path) -> Any:
        """Start the right program."""
        limit = self.args.limit
        if variant.engine in self.benches:
            binary, words = self.benches[variant.engine], self.help[variant.engine]
            command = bench_command(binary, words, file, variant, phases, self.case.in_memory)
            return run_bench(command, variant, phases, file, limit)
        settings = {
            "folder": str(self.folder),
            "model": str(file),
            "ram": self.args.our_ram,
            "threads": self.args.threads if variant.engine == OURS else variant.threads,
            "routing": self.args.routing,
            "in_memory": self.case.in_memory,
            "phases": [asdict(phase) for phase in phases],
        }
        script = "peer_ours.py" if variant.engine == OURS else "peer_xllamacpp.py"
        return run_child(script, settings, file, limit)

    def _judge(self, record: Record, variant: Variant, phase: Phase, facts: dict[str, Any]) -> None:
        from peer_gguf import peer_router, token_work  # noqa: PLC0415

        kind = self.case.kinds[0] if variant.engine == OURS else variant.kind
        demand = facts.get("demand") or asdict(token_work(self.config, kind))
        distinct = 1.0
        if phase.prefill:
            router = peer_router(self.config, self.args.routing)
            distinct = len(np.unique(router.trace(0, phase.tokens))) / router.k
        judge(record, demand, distinct, phase.tokens if phase.prefill else 1)


def _help(binary: Path) -> str:
    done = subprocess.run([str(binary), "--help"], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def read_logs(files: Sequence[Path]) -> list[Record]:
    """The records of several logs."""
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def main(argv: Sequence[str]) -> None:
    """Compare, or report."""
    args = parser().parse_args(argv)
    if args.case == "report":
        records = read_logs(args.logs or [args.log])
    else:
        comparison = Comparison(args)
        comparison.prepare()
        if not machine.drop_caches():
            print("not root: the page cache cannot be dropped, so runs begin with what the last one left", flush=True)
        first = 1 + max((record["round"] for record in comparison.records), default=0)
        for number in range(first, first + args.rounds):
            for variant, phases, ahead in [*comparison.plan(number)]:
                comparison.run(number, variant, phases, ahead)
        records = comparison.records
    summary = summarise(records)
    print("\n".join(table(summary)))
    facts = {"cpu": system.cpu_name(), "memory": system.memory().total, "cores": system.cpu_count()}
    print(json.dumps({"machine": facts, "rows": summary}))


if __name__ == "__main__":
    main(sys.argv[1:])
