"""Matrix products against this machine's ceilings, for choosing between kernels: one JSON line per case.

Each round measures a ceiling and then a case for some milliseconds, so that a busy neighbour or a drifting clock meets
both; the median ratio is what counts. Products of one row cycle through more memory than any cache holds. With
``--cpu-time`` (one thread only) the time a core was taken away is left out, which is the only way to compare kernels
on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np

from moestream import _native
from moestream.checkpoint.encoding import Encoding, ExpertLayout, MatrixLayout
from moestream.ops.base import U8, Wave
from moestream.ops.cpu import CpuOps

AFFINE = Encoding("affine", 4, 64)
BURST_BYTES = 60_000_000  # read in one measurement of a memory-bound case


def random_parts(layout: MatrixLayout, rng: np.random.Generator) -> list[U8]:
    """Bytes of a matrix: random codes; scales and biases of 0.0078 (bf16)."""
    codes, *floats = layout.part_nbytes
    return [rng.integers(0, 256, codes, dtype=np.uint8), *(np.full(n // 2, 0x3C00, "<u2").view("u1") for n in floats)]


@dataclass
class Linear:
    """``count`` activation rows times one matrix after another."""

    encoding: Encoding
    rows: int
    cols: int
    count: int
    total: int  # bytes of all matrices
    exact: bool = False

    def prepare(self, ops: CpuOps) -> None:
        """Make the matrices."""
        rng = np.random.default_rng(0)
        layout = MatrixLayout(self.rows, self.cols, self.encoding)
        parts = random_parts(layout, rng)
        copies = max(1, self.total // layout.nbytes)
        self.matrices = [ops.matrix(layout, [p.copy() for p in parts]) for _ in range(copies)]
        self.x = rng.standard_normal((self.count, self.cols)).astype(np.float32)
        self.burst = max(1, min(copies, BURST_BYTES // layout.nbytes))
        self.nbytes = self.burst * layout.nbytes
        self.operations = 2 * self.burst * self.rows * self.cols * self.count

    def run(self, ops: CpuOps, number: int) -> None:
        """Multiply with the next few matrices."""
        for i in range(self.burst):
            ops.linear(self.x, [self.matrices[(number * self.burst + i) % len(self.matrices)]])


@dataclass
class Experts:
    """Waves of 8 experts that serve ``count`` rows each."""

    encoding: Encoding
    hidden: int
    width: int
    count: int
    total: int
    exact: bool = False

    def prepare(self, ops: CpuOps) -> None:
        """Make the experts."""
        del ops
        rng = np.random.default_rng(0)
        gate = MatrixLayout(self.width, self.hidden, self.encoding)
        layout = ExpertLayout(gate, gate, MatrixLayout(self.hidden, self.width, self.encoding))
        one = np.concatenate([p for m in layout.matrices for p in random_parts(m, rng)])
        self.copies = max(8, self.total // layout.nbytes)
        begins = np.cumsum([0, *layout.part_nbytes[:-1]])
        self.offsets = np.arange(self.copies, dtype=np.int64)[:, None] * layout.nbytes + begins
        starts = np.arange(9, dtype=np.int32) * self.count
        pairs = np.arange(8 * self.count, dtype=np.int32).reshape(self.count, 8).T.reshape(-1).copy()
        chosen = np.arange(8, dtype=np.int32)
        self.wave = Wave(0, layout, chosen, np.tile(one, self.copies), self.offsets[:8], starts, pairs)
        self.x = rng.standard_normal((self.count, self.hidden)).astype(np.float32)
        self.out = np.empty((self.count * 8, self.hidden), np.float32)
        self.nbytes = 8 * layout.nbytes
        self.operations = 2 * 8 * self.count * 3 * self.hidden * self.width

    def run(self, ops: CpuOps, number: int) -> None:
        """One wave."""
        chosen = (number * 8 + np.arange(8)) % self.copies
        ops.experts(self.x, replace(self.wave, offsets=self.offsets[chosen]), 8, self.out)


def cases(total: int) -> dict[str, tuple[str, Linear | Experts]]:
    """Name -> (ceiling, case)."""
    return {
        "vector 4-bit 4096x4096": ("bytes", Linear(AFFINE, 4096, 4096, 1, total)),
        "vector 4-bit 768x2048": ("bytes", Linear(AFFINE, 768, 2048, 1, total)),
        "vector 8-bit 4096x4096": ("bytes", Linear(Encoding("affine", 8, 64), 4096, 4096, 1, total)),
        "vector bf16 4096x4096": ("bytes", Linear(Encoding("bf16"), 4096, 4096, 1, total)),
        "vector 4-bit 4096x4096 exact": ("bytes", Linear(AFFINE, 4096, 4096, 1, total, exact=True)),
        "2 rows 4-bit 4096x4096": ("bytes", Linear(AFFINE, 4096, 4096, 2, total)),
        "3 rows 4-bit 4096x4096": ("bytes", Linear(AFFINE, 4096, 4096, 3, total)),
        "experts of 1 row, 2048 768": ("bytes", Experts(AFFINE, 2048, 768, 1, total)),
        "experts of 1 row, 4096 1024": ("bytes", Experts(AFFINE, 4096, 1024, 1, total)),
        "experts of 32 rows, 2048 768": ("int8", Experts(AFFINE, 2048, 768, 32, total)),
        "experts of 10 rows, 4096 1024": ("int8", Experts(AFFINE, 4096, 1024, 10, total)),
        "512 rows 4-bit 4096x4096": ("int8", Linear(AFFINE, 4096, 4096, 512, 1)),
        "512 rows bf16 4096x4096": ("fma", Linear(Encoding("bf16"), 4096, 4096, 512, 1)),
        "512 rows 4-bit 4096x4096 exact": ("fma", Linear(AFFINE, 4096, 4096, 512, 1, exact=True)),
    }


def ceiling_of(kind: str) -> float:
    """Bytes or operations per second, measured now."""
    if kind == "bytes":
        return _native.memory_bandwidth(128 << 20, 0.0)
    return _native.int8_peak(0.01) if kind == "int8" else _native.fma_peak(0.01)


def measure(name: str, kind: str, case: Linear | Experts, ops: CpuOps, rounds: int, cpu_time: bool) -> None:
    """Print one line."""
    case.prepare(ops)
    clock = time.thread_time if cpu_time else time.perf_counter
    work = case.nbytes if kind == "bytes" else case.operations
    case.run(ops, 0)
    ceilings, rates = [], []
    for i in range(rounds):
        ceilings.append(ceiling_of(kind))
        for j in range(3):
            start = clock()
            case.run(ops, 1 + 3 * i + j)
            rates.append(work / (clock() - start))
    ratios = [rate / ceilings[i // 3] for i, rate in enumerate(rates)]
    line = {
        "case": name,
        "threads": ops.threads,
        "unit": "GB/s" if kind == "bytes" else "GOP/s",
        "median": round(statistics.median(rates) / 1e9, 1),
        "best": round(max(rates) / 1e9, 1),
        "ceiling": round(statistics.median(ceilings) / 1e9, 1),
        "of ceiling": round(statistics.median(ratios), 2),
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    """Measure every case with every number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gigabytes", type=float, default=1.2, help="memory that one-row products cycle through")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tier", default="", help="portable, neon, avx2 or avx512")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    if args.tier:
        _native.set_active_isa(args.tier)
    for threads in args.threads:
        for name, (kind, case) in cases(int(args.gigabytes * 1e9)).items():
            if args.only in name:
                measure(name, kind, case, CpuOps(threads, case.exact), args.rounds, args.cpu_time)


if __name__ == "__main__":
    main()
