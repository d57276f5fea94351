"""Expert ids for benchmarks: random weights route almost uniformly, trained models do not.

A trained router prefers some experts for a while and then others. Here each expert of a layer has a popularity drawn
from Zipf's law; a token picks k distinct experts in proportion to it; and the popularities are exchanged between
experts over time, so that a static list of hot experts is of little use. The two constants are fitted to the hit
rates published for a 512-expert model (top-10, LRU per layer): 67 % with 64 slots, 81 % with 128.

Shape letters: R rows (tokens in order), E experts, k experts per token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ZIPF_EXPONENT = 1.265
LIFETIME = 1000
"""Tokens after which an expert's popularity has changed hands once on average."""
CHUNK = 64


class SyntheticRouter:
    """An endless, reproducible trace of expert ids for each layer."""

    def __init__(self, num_experts: int, k: int, layers: int, seed: int = 0, uniform: bool = False) -> None:
        """Prepare the traces.

        Args:
            num_experts: E.
            k: experts per token, at most E.
            layers: number of independent traces.
            seed: the same seed gives the same ids.
            uniform: all experts equally popular, the worst case for a cache.
        """
        exponent = 0.0 if uniform else ZIPF_EXPONENT
        self._k = k
        self._layers = [_Layer(num_experts, exponent, [seed, layer]) for layer in range(layers)]

    def ids(self, layer: int, rows: int) -> npt.NDArray[np.int32]:
        """The experts of the next tokens of one layer.

        Args:
            layer: which trace.
            rows: R.

        Returns:
            int32 [R, k], distinct within a row.
        """
        return self._layers[layer].take(rows, self._k)


class _Layer:
    """The trace of one layer, made in chunks because the popularities move between chunks."""

    def __init__(self, num_experts: int, exponent: float, seed: list[int]) -> None:
        self._random = np.random.default_rng(seed)
        ranks = self._random.permutation(num_experts) + 1
        self._weight = (ranks**exponent).astype(np.float32)  # [E], 1 / popularity
        self._swaps = round(num_experts * CHUNK / LIFETIME)
        self._ready = np.empty((0, 0), np.int32)

    def take(self, rows: int, k: int) -> npt.NDArray[np.int32]:
        parts = [self._ready.reshape(-1, k)]
        have = len(parts[0])
        while have < rows:
            parts.append(self._chunk(k))
            have += CHUNK
        joined = np.concatenate(parts)
        self._ready = joined[rows:]
        return np.ascontiguousarray(joined[:rows])

    def _chunk(self, k: int) -> npt.NDArray[np.int32]:
        """The next tokens: the k smallest of exponential waiting times are k draws without replacement."""
        experts = len(self._weight)
        moved = self._random.permutation(experts)[: self._swaps]
        self._weight[moved] = self._weight[np.roll(moved, 1)]
        waits = self._random.standard_exponential((CHUNK, experts), dtype=np.float32) * self._weight
        return np.argpartition(waits, k - 1, axis=1)[:, :k].astype(np.int32)
