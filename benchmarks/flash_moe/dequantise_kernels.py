"""Claim: factoring scale and bias out of the inner loop of the 4-bit kernel is worth +12 %.

Compiles dequantise_kernels.cpp with the system's C++ compiler (CXX, else c++) and runs four float32 kernels that differ
in nothing else, on a matrix that stays in the core's own cache and on one that comes from memory. Beside them the
product's kernels on the same matrix shape: float32 (``--exact``) and int8 activations.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from time import perf_counter

import common
import numpy as np

from moestream import _native
from moestream.checkpoint.encoding import Encoding, MatrixLayout
from moestream.ops.cpu import CpuOps
from moestream.system import cpu_count

COLS = 4096
FLAGS = ("-O3", "-std=c++17", "-march=native", "-ffp-contract=off", "-pthread")
CASES = {"in cache, 1 thread": (1, 500), "from memory, all threads": (0, 400_000)}
"""Name: threads (0: all) and kilobytes."""


def build(folder: Path) -> Path:
    """Compile the kernels.

    Raises:
        SystemExit: there is no compiler, or it refuses.
    """
    binary = folder / "dequantise_kernels"
    command = [os.environ.get("CXX", "c++"), *FLAGS, str(Path(__file__).with_suffix(".cpp")), "-o", str(binary)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"cannot compile with {command[0]}: {error}; install g++ or set CXX") from error
    return binary


def parse(output: str) -> dict[str, list[float]]:
    """GB/s of each variant from lines ``name rate``."""
    rates: dict[str, list[float]] = defaultdict(list)
    for line in output.splitlines():
        name, rate = line.split()
        rates[name].append(float(rate))
    return dict(rates)


def product(threads: int, kilobytes: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of ``linear`` on one row, in both modes, over matrices of the same total size."""
    layout = MatrixLayout(max(8, min(4096, kilobytes * 1000 // 2304)), COLS, Encoding("affine", 4, 64))
    random = np.random.default_rng(0)
    x = random.standard_normal((1, COLS)).astype(np.float32)
    codes, *floats = layout.part_nbytes
    parts = [
        random.integers(0, 256, codes, dtype=np.uint8),
        *(np.full(n // 2, 0x3C00, "<u2").view("u1") for n in floats),
    ]
    count = max(1, kilobytes * 1000 // layout.nbytes)

    def rate(ops: CpuOps) -> float:
        matrices = [ops.matrix(layout, [part.copy() for part in parts]) for _ in range(count)]
        passes = max(1, int(3e9 / (layout.nbytes * count)))
        for matrix in matrices:
            ops.linear(x, [matrix])
        start = perf_counter()
        for _ in range(passes):
            for matrix in matrices:
                ops.linear(x, [matrix])
        return passes * count * layout.nbytes / (perf_counter() - start) / common.GB

    return common.interleave(
        {
            "product, float32": lambda: rate(CpuOps(threads, exact=True)),
            "product, int8 activations": lambda: rate(CpuOps(threads)),
        },
        rounds,
    )


def main() -> None:
    """Build, run both cases, report."""
    parser = common.arguments(__doc__, 5)
    args: argparse.Namespace = parser.parse_args()
    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        binary = build(Path(folder))
        for case, (threads, kilobytes) in CASES.items():
            count = threads or cpu_count()
            _native.set_threads(count)
            memory = common.memory_rate() / common.GB
            command = [str(binary), str(count), str(kilobytes), str(args.rounds)]
            rates = parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rates |= product(count, kilobytes, args.rounds)
            ceiling = None if threads else (memory + common.memory_rate() / common.GB) / 2
            print(f"{case}: GB/s of quantised weights" + (f"; ceiling memory {ceiling:.1f}" if ceiling else ""))
            print("\n".join(common.table(rates, "naive", "GB/s", ceiling)))
            facts[case] = {"ceiling": ceiling, "GB_s": common.medians(rates)}
            facts[case]["ratio_to_naive"] = {name: common.paired(rates, name, "naive") for name in rates}
    common.report("FMA-factored dequantisation +12 %", facts)


if __name__ == "__main__":
    main()
