"""Claim: trusting the page cache is +38 % over an own cache.

Decodes with each cache mode at the same memory: a control group limits the process and the page cache it fills alike
(version 1 or 2 of the interface; root is needed to make one). ``arena``: direct reads into slots kept by LFRU.
``page``: buffered reads, the kernel caches. ``hybrid``: slots over buffered reads. Each run is a process of its own and
starts with the file dropped from the page cache; its first tokens are reported apart from the later ones. All runs
decode the same calibrated synthetic routing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import common

from moestream import LLM
from moestream.checkpoint.routing import SyntheticRouter
from moestream.config import parse_size

GROUPS = Path("/sys/fs/cgroup")
MARGIN = 300_000_000
"""Beyond the budget, for what the kernel charges to the group: page tables, sockets, the reader's pages."""


@contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    """A control group of at most ``nbytes``, page cache included.

    Raises:
        SystemExit: it cannot be made here.
    """
    v1 = (GROUPS / "memory").is_dir()
    group = (GROUPS / "memory" if v1 else GROUPS) / f"moestream-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(nbytes))
    except OSError as error:
        raise SystemExit(
            f"cannot make the control group {group}: {error}; run as root, or run each mode yourself under "
            f"`systemd-run --scope -p MemoryMax={nbytes}` with --mode"
        ) from error
    try:
        yield group
    finally:
        group.rmdir()


def decode(model: Path, mode: str, ram: int, tokens: int, segment: int) -> list[dict[str, float]]:
    """Decode in this process; tok/s and MB from the disk a token of each segment."""
    common.forget(common.largest_file(model))
    facts = []
    with LLM.load(model, ram=ram, cache=mode, context=2048, max_batch=1) as llm:  # type: ignore[arg-type]
        moe, layers = llm.runtime.config.moe, len(llm.runtime.config.layers)
        llm.runtime.model.router_override = SyntheticRouter(moe.experts, moe.active, layers, seed=1).ids
        stream = llm.stream([1, 2, 3], max_tokens=tokens + 1, temperature=0, ignore_eos=True)
        next(stream)
        for _ in range(tokens // segment):
            before, start = llm.runtime.store.stats(), perf_counter()
            for _ in range(segment):
                next(stream)
            took, stats = perf_counter() - start, llm.runtime.store.stats() - before
            facts.append(
                {
                    "tok_s": segment / took,
                    "disk_MB": stats.bytes_read / segment / 1e6,
                    "page_cache_MB": stats.bytes_cached / segment / 1e6,
                    "hit_rate": stats.hit_rate,
                }
            )
        stream.close()
    return facts


def child(args: Any, mode: str, group: Path) -> list[dict[str, float]]:
    """Run one mode as a process that enters the control group before it starts."""
    command: Sequence[str] = (
        *(sys.executable, __file__, str(args.model), "--mode", mode, "--ram", str(args.ram)),
        *("--tokens", str(args.tokens), "--segment", str(args.segment)),
    )
    enter = f'echo $$ > "{group / "cgroup.procs"}" && exec "$@"'
    done = subprocess.run(["sh", "-c", enter, "sh", *command], check=True, stdout=subprocess.PIPE, text=True)
    facts: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return facts


def main() -> None:
    """All modes in turn, each in its group; or one mode in this process."""
    parser = common.arguments(__doc__, 2)
    parser.add_argument("model", type=Path, help="folder whose experts are larger than --ram")
    parser.add_argument("--ram", default="5GB", help="memory of process and page cache together (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=240, help="tokens decoded (default %(default)s)")
    parser.add_argument("--segment", type=int, default=40, help="tokens of one figure (default %(default)s)")
    parser.add_argument("--modes", nargs="+", default=["arena", "page", "hybrid"], help="(default all three)")
    parser.add_argument("--mode", help="run this one here, without a group, and print its segments")
    args = parser.parse_args()
    ram = parse_size(args.ram, "--ram")
    if args.mode:
        print(json.dumps(decode(args.model, args.mode, ram, args.tokens, args.segment)))
        return
    file = common.largest_file(args.model)
    disks = [common.disk_rate(file)]
    runs: dict[str, list[list[dict[str, float]]]] = {mode: [] for mode in args.modes}
    for number in range(args.rounds):
        for mode in args.modes if number % 2 == 0 else reversed(args.modes):
            with limited(ram + MARGIN) as group:
                runs[mode].append(child(args, mode, group))
            disks.append(common.disk_rate(file))
    disk = sum(disks) / len(disks)
    print(f"ceiling: disk {disk / common.GB:.2f} GB/s; {args.ram} for process and page cache together")
    facts: dict[str, Any] = {}
    half = max(1, args.tokens // args.segment // 2)
    for when, part in (("first", slice(0, 1)), ("steady", slice(half, None))):
        rates = {mode: [_mean(run[part], "tok_s") for run in runs[mode]] for mode in runs}
        print(f"{when} tokens: tok/s")
        print("\n".join(common.table(rates, args.modes[0], "tok/s")))
        facts[when] = {
            mode: {key: _mean([s for run in runs[mode] for s in run[part]], key) for key in runs[mode][0][0]}
            for mode in runs
        }
        for mode, fact in facts[when].items():
            print(
                f"  {mode}: {fact['disk_MB']:.0f} MB a token from the disk, {fact['page_cache_MB']:.0f} from the page "
                f"cache, slots hit {100 * fact['hit_rate']:.0f} %"
            )
    common.report("trusting the page cache +38 %", {"disk_GB_s": disk / common.GB, "ram": args.ram, **facts})


def _mean(segments: Sequence[dict[str, float]], key: str) -> float:
    return sum(segment[key] for segment in segments) / len(segments)


if __name__ == "__main__":
    main()
