"""What these scripts share: probes of the machine, interleaved runs, and the report with its JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moestream import _native
from moestream.system import cpu_count, cpu_name

GB = 1e9
EXPERT_NBYTES = 7_077_888
"""One expert of Qwen3.5-397B-A17B at 4 bits, group 64: 3 x 1024 x 4096 codes with bf16 scales and biases."""


def arguments(text: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="times each variant is measured (default %(default)s)"
    )
    return parser


def interleave(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure all variants once a round, in turn, so that a drifting disk or a busy neighbour meets all of them.

    Every second round goes backwards: no variant always follows the same other.
    """
    results: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        names = list(variants)
        for name in names if number % 2 == 0 else reversed(names):
            results[name].append(variants[name]())
    return results


def medians(results: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each variant."""
    return {name: statistics.median(values) for name, values in results.items()}


def paired(results: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """The median over rounds of ``name`` / ``base``: both met the same machine."""
    return statistics.median(a / b for a, b in zip(results[name], results[base], strict=True))


def table(results: Mapping[str, Sequence[float]], base: str, unit: str, ceiling: float | None = None) -> list[str]:
    """One line a variant: median, spread, ratio to ``base``, percent of the ceiling."""
    width = max(len(name) for name in results)
    lines = []
    for name, values in results.items():
        median = statistics.median(values)
        line = f"  {name:<{width}}  {median:8.2f} {unit}  ({min(values):.2f} to {max(values):.2f})"
        line += f"  {paired(results, name, base):5.2f}x {base}"
        if ceiling:
            line += f"  {100 * median / ceiling:4.0f} % of the ceiling"
        lines.append(line)
    return lines


def memory_rate() -> float:
    """Bytes per second of sequential reads with the compute threads."""
    return float(_native.memory_bandwidth(1 << 29, 0.4))


def disk_rate(file: Path, threads: int = 8) -> float:
    """Bytes per second of random direct reads of 8 MB."""
    return float(_native.probe_read(str(file), 8 << 20, 0.7, True, threads))


def largest_file(model: Path) -> Path:
    """The largest weight file of a folder.

    Raises:
        SystemExit: the folder has none.
    """
    files = sorted(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    if not files:
        raise SystemExit(
            f"{model} holds no .safetensors file: write one with `moestream bench --synthetic qwen3.5-397b`"
        )
    return files[-1]


def forget(file: Path) -> None:
    """Drop a file's clean pages from the page cache; needs no root."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def report(claim: str, facts: Mapping[str, Any]) -> None:
    """Print the JSON line, last."""
    machine = {"cpu": cpu_name(), "cores": cpu_count(), "isa": _native.active_isa(), "os": platform.platform()}
    print(json.dumps({"claim": claim, "machine": machine, **facts}))
