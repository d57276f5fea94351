"""What fusing an expert is worth: gate, up, SwiGLU and down of all routed experts in one native region.

One decoded token's k experts of one layer of Qwen3.5-397B-A17B (4 bits, hidden 4096, width 1024) from memory, computed
three ways with the same inner kernels:

* fused: one call for all k experts, as the product does it;
* per expert: one call an expert (gate, up, activation and down inside);
* separate: gate and up by one call, the activation in numpy, down by another, for each expert.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import common
import numpy as np

from moestream import _native
from moestream.checkpoint.encoding import Encoding, ExpertLayout, MatrixLayout
from moestream.experts.arena import allocate
from moestream.ops.base import F32, U8, Matrix, Wave
from moestream.ops.cpu import CpuOps

HIDDEN, WIDTH, K, LAYERS = 4096, 1024, 10, 8
"""LAYERS groups of K experts are cycled through: 570 MB, far more than any cache."""


class Experts:
    """Experts in one memory, as waves and as single matrices."""

    def __init__(self, ops: CpuOps) -> None:
        encoding = Encoding("affine", 4, 64)
        wide, narrow = MatrixLayout(WIDTH, HIDDEN, encoding), MatrixLayout(HIDDEN, WIDTH, encoding)
        self.layout = ExpertLayout(wide, wide, narrow)
        self.ops = ops
        random = np.random.default_rng(0)
        self.memory: U8 = allocate(self.layout.nbytes * K * LAYERS)
        one = self._random_expert(random)
        offsets = np.concatenate([[0], np.cumsum(self.layout.part_nbytes)[:-1]])
        self.waves: list[Wave] = []
        self.matrices: list[list[list[Matrix]]] = []  # [LAYERS][K][gate, up, down]
        for layer in range(LAYERS):
            starts = (np.arange(K) + layer * K) * self.layout.nbytes
            for start in starts:
                self.memory[start : start + len(one)] = one
            at = (starts[:, None] + offsets).astype(np.int64)  # [K, P]
            ids = np.arange(K, dtype=np.int32)
            self.waves.append(Wave(layer, self.layout, ids, self.memory, at, np.arange(K + 1, dtype=np.int32), ids))
            self.matrices.append([self._matrices(row) for row in at])
        self.x: F32 = random.standard_normal((1, HIDDEN)).astype(np.float32)
        self.out = np.empty((K, HIDDEN), np.float32)

    def _random_expert(self, random: np.random.Generator) -> U8:
        """Random codes, scales of about 0.01, biases that centre them."""
        parts = []
        for i, nbytes in enumerate(self.layout.part_nbytes):
            if i % 3 == 0:
                parts.append(random.integers(0, 256, nbytes, dtype=np.uint8))
            else:
                parts.append(np.full(nbytes // 2, 0x3C24 if i % 3 == 1 else 0xBD9A, "<u2").view(np.uint8))
        return np.concatenate(parts)

    def _matrices(self, at: np.ndarray) -> list[Matrix]:
        sizes = self.layout.part_nbytes
        parts = [self.memory[start : start + size] for start, size in zip(at.tolist(), sizes, strict=True)]
        return [self.ops.matrix(m, parts[3 * i : 3 * i + 3]) for i, m in enumerate(self.layout.matrices)]

    def fused(self, layer: int) -> None:
        """All experts by one call."""
        self.ops.experts(self.x, self.waves[layer], K, self.out)

    def per_expert(self, layer: int) -> None:
        """One call an expert."""
        for i, (gate, up, down) in enumerate(self.matrices[layer]):
            self.out[i] = self.ops.swiglu(self.x, gate, up, down)[0]

    def separate(self, layer: int) -> None:
        """Two calls an expert, the activation between them."""
        for i, (gate, up, down) in enumerate(self.matrices[layer]):
            g, u = self.ops.linear(self.x, [gate, up])
            self.out[i] = self.ops.linear(g / (1 + np.exp(-g)) * u, [down])[0][0]

    def rate(self, run: Callable[[int], None]) -> float:
        """GB/s of expert bytes over all layers, a few times."""
        start = perf_counter()
        for _ in range(4):
            for layer in range(LAYERS):
                run(layer)
        return 4 * LAYERS * K * self.layout.nbytes / (perf_counter() - start) / common.GB


def main() -> None:
    """Check that the three agree, then interleave them."""
    args = common.arguments(__doc__, 7).parse_args()
    experts = Experts(CpuOps())
    ways = {"separate": experts.separate, "per expert": experts.per_expert, "fused": experts.fused}
    outputs = []
    for run in ways.values():
        run(0)
        outputs.append(experts.out.copy())
    scale = float(np.abs(outputs[0]).max())
    for name, out in zip(ways, outputs, strict=True):
        if not np.abs(out - outputs[0]).max() <= 0.02 * scale:  # int8 rounding of the intermediate may differ
            raise SystemExit(f"{name} computes something else")
    before = common.memory_rate()
    rates = common.interleave({name: lambda run=run: experts.rate(run) for name, run in ways.items()}, args.rounds)
    ceiling = (before + common.memory_rate()) / 2 / common.GB
    print(f"ceiling: memory {ceiling:.1f} GB/s with {_native.threads()} threads; {K} experts of one layer and token")
    print("\n".join(common.table(rates, "separate", "GB/s", ceiling)))
    ratios = {name: common.paired(rates, name, "separate") for name in rates}
    common.report("fused experts", {"memory_GB_s": ceiling, "GB_s": common.medians(rates), "ratio": ratios})


if __name__ == "__main__":
    main()
