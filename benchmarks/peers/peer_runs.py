"""One run of one program: its command, its output, and what the machine did meanwhile.

Every program becomes phases of windows ``(start, end, tokens)`` on the monotonic clock. ``llama-bench`` prints a test
when it is through, with the duration of each repetition: the windows are counted back from that moment. Programs of
ours (``peer_ours.py``, ``peer_xllamacpp.py``) print their windows themselves.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_machine import Sampler, block_device

Window = tuple[float, float, int]
BYTES_KEPT = 400
DISTURBED = 0.1
"""Cores that other processes may take from a window that counts."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What is timed: windows of ``tokens``, of which the first ``settle`` do not count."""

    name: str
    prefill: bool
    tokens: int
    settle: int
    windows: int

    @property
    def repetitions(self) -> int:
        """Windows in all."""
        return self.settle + self.windows


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a program."""

    engine: str
    """The label people gave it; ours is ``moestream``."""
    kind: str
    """Format of the matrices."""
    threads: int
    passive: bool = False
    """Waiting threads sleep: more threads than cores may then wait for the disk."""
    repack: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        words = [self.kind, "repacked" if self.repack else "", f"{self.threads} threads", "passive" * self.passive]
        return " ".join(word for word in words if word)


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ended: its windows by phase, or why there are none."""

    phases: dict[str, list[Window]]
    seconds: float
    error: str | None
    facts: dict[str, Any]
    """What it says about itself."""
    sampler: Sampler


def bench_command(
    binary: Path, help_text: str, model: Path, variant: Variant, phases: Sequence[Phase], in_memory: bool
) -> list[str]:
    """The command line of a ``llama-bench``, in the words that this one knows.

    Args:
        binary: its path.
        help_text: what ``llama-bench --help`` printed.
        model: the GGUF file.
        variant: threads and layout.
        phases: at most one of them decodes; all have the same number of repetitions. The first ones are the warm-up.
        in_memory: load the weights into memory of the process; else map the file.
    """
    knows = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_text))
    prompts = [phase.tokens for phase in phases if phase.prefill]
    decode = [phase.tokens for phase in phases if not phase.prefill]
    command = [str(binary), "-m", str(model), "-o", "json", "-t", str(variant.threads)]
    command += ["-r", str(max(phase.repetitions for phase in phases))]
    command += ["-p", ",".join(map(str, prompts)) or "0", "-n", ",".join(map(str, decode)) or "0"]
    if prompts:
        command += ["-b", str(max(prompts)), "-ub", str(max(prompts))]
    if "--load-mode" in knows:
        command += ["--load-mode", "none" if in_memory else "mmap"]
    elif "-mmp" in knows:
        command += ["-mmp", "0" if in_memory else "1"]
    if "--repack" in knows:
        command += ["--repack", str(int(variant.repack))]
    elif "-rtr" in knows:
        command += ["-rtr", str(int(variant.repack))]
    command += ["--no-warmup"] if "--no-warmup" in knows else ["-w", "0"] if "-w" in knows else []
    return command


def can_repack(help_text: str) -> bool:
    """Whether a ``llama-bench`` can be told to rearrange weights when it loads them, or not to."""
    return "--repack" in help_text or "-rtr" in help_text


def parse_bench(text: str) -> list[dict[str, Any]]:
    """The tests in the output of ``llama-bench -o json``, which other lines may precede or follow.

    Raises:
        ValueError: there is no complete list.
    """
    start = re.search(r"^\[\s*$|^\[\s*\{", text, re.MULTILINE)
    if not start:
        raise ValueError("no JSON in the output of llama-bench")
    tests: list[dict[str, Any]] = json.JSONDecoder().raw_decode(text[start.start() :])[0]
    return tests


def bench_windows(
    tests: Sequence[dict[str, Any]], printed: Sequence[float], phases: Sequence[Phase]
) -> dict[str, list[Window]]:
    """The windows of each phase, counted back from the moments at which its test was printed."""
    found: dict[str, list[Window]] = {}
    for test, moment in zip(tests, printed, strict=True):
        end = moment
        tokens = test["n_prompt"] or test["n_gen"]
        (phase,) = (p for p in phases if p.prefill == bool(test["n_prompt"]) and p.tokens == tokens)
        windows: list[Window] = []
        for duration in reversed([ns / 1e9 for ns in test["samples_ns"]]):
            windows.append((end - duration, end, tokens))
            end -= duration
        found[phase.name] = windows[::-1]
    return found


def run_bench(command: list[str], variant: Variant, phases: Sequence[Phase], model: Path, limit: float) -> Finished:
    """Run a ``llama-bench``; at most ``limit`` seconds."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"} if variant.passive else None
    text, chunks, error, seconds, sampler = _run(command, model, limit, environment)
    try:
        tests = parse_bench(text) if not error else []
        ends = [match.start() for match in re.finditer('"samples_ns"', text)]
        printed = [next(at for at, size in chunks if size > end) for end in ends]
        windows = bench_windows(tests, printed, phases) if tests else {}
    except ValueError as problem:
        error, tests, windows = str(problem), [], {}
    facts = {key: tests[0].get(key) for key in ("build_commit", "build_number", "cpu_info")} if tests else {}
    return Finished(windows, seconds, error, facts, sampler)


def run_child(script: str, settings: dict[str, Any], model: Path, limit: float) -> Finished:
    """Run one of the programs beside this file, which takes its settings as JSON and prints its windows as JSON."""
    command = [sys.executable, str(Path(__file__).with_name(script)), json.dumps(settings)]
    text, _, error, seconds, sampler = _run(command, model, limit, None)
    output = json.loads(text.splitlines()[-1]) if not error else {"phases": {}}
    phases = {name: [(a, b, n) for a, b, n in windows] for name, windows in output.pop("phases").items()}
    return Finished(phases, seconds, error, output, sampler)


def _run(
    command: list[str], model: Path, limit: float, environment: dict[str, str] | None
) -> tuple[str, list[tuple[float, int]], str | None, float, Sampler]:
    """Output, when each piece of it came (moment, bytes so far), what went wrong, duration and the sampler."""
    start = time.monotonic()
    output, chunks = b"", []
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        process.kill()

    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
    ):
        sampler = Sampler(process.pid, block_device(model))
        timer = threading.Timer(limit, stop)
        timer.start()
        assert process.stdout
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            output += piece
            chunks.append((time.monotonic(), len(output)))
        code = process.wait()
        timer.cancel()
        seconds = time.monotonic() - start
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - BYTES_KEPT))
        said = " ".join(errors.read().decode(errors="replace").split())
    error = f"timed out after {limit:g} s" if timed_out.is_set() else f"ended with {code}: {said}" if code else None
    return output.decode(errors="replace"), chunks, error, seconds, sampler


def measure(finished: Finished, phase: Phase) -> dict[str, Any]:
    """What the counted windows of a phase amount to: tokens per second, bytes, disk and processor.

    Returns:
        ``rates`` of the windows that nobody disturbed (all of them, and ``disturbed``, if there is none),
        ``bytes_per_token``, ``in_flight``, ``cores``, ``seconds_per_token``, or ``error``.
    """
    windows = finished.phases.get(phase.name, [])[phase.settle :]
    if finished.error or not windows:
        return {"error": finished.error or f"no result for {phase.name}"}
    usages = [finished.sampler.between(a, b) for a, b, _ in windows]
    quiet = [i for i, usage in enumerate(usages) if usage.others < DISTURBED]
    kept = quiet or range(len(windows))
    tokens = sum(windows[i][2] for i in kept)
    seconds = sum(usages[i].seconds for i in kept)
    return {
        "rates": [windows[i][2] / usages[i].seconds for i in kept],
        "disturbed": not quiet,
        "tokens": tokens,
        "bytes_per_token": sum(usages[i].bytes_read for i in kept) / tokens,
        "seconds_per_token": seconds / tokens,
        "in_flight": sum(usages[i].in_flight * usages[i].seconds for i in kept) / seconds,
        "cores": sum(usages[i].cores * usages[i].seconds for i in kept) / seconds,
        "others": max(usage.others for usage in usages),
    }


def describe(phase: Phase, variant: Variant) -> dict[str, Any]:
    """A phase and a variant as plain values."""
    return {"phase": phase.name, "variant": variant.name, **asdict(variant)}
