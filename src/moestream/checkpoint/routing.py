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
RECALL = 0.7
"""Of a predictor that applies the next layer's router to this layer's residual: 0.59 to 0.89 are published, and the
trained model in this package has 0.83 (0.80 among cache misses)."""


def rarity(experts: int, exponent: float, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """1 / popularity of each expert [E], by Zipf's law with this exponent."""
    weight: npt.NDArray[np.float32] = ((random.permutation(experts) + 1) ** exponent).astype(np.float32)
    return weight


def draw(rarity: npt.NDArray[np.float32], rows: int, k: int, random: np.random.Generator) -> npt.NDArray[np.int32]:
    """Experts of some tokens [R, k]: the k smallest of exponential waiting times are k draws without replacement."""
    out = np.empty((rows, k), np.int32)
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        waits = random.standard_exponential((count, len(rarity)), dtype=np.float32) * rarity
        out[start : start + count] = np.argpartition(waits, k - 1, axis=1)[:, :k]
    return out


def drift(rarity: npt.NDArray[np.float32], random: np.random.Generator) -> None:
    """What happens to popularities [E] in ``CHUNK`` tokens: some change hands, each once in ``LIFETIME`` on average."""
    experts = len(rarity)
    moved = random.permutation(experts)[: round(experts * CHUNK / LIFETIME)]
    rarity[moved] = rarity[np.roll(moved, 1)]


class SyntheticRouter:
    """An endless, reproducible trace of expert ids for each layer."""

    def __init__(
        self,
        num_experts: int,
        k: int,
        layers: int,
        seed: int = 0,
        uniform: bool = False,
        recall: float = RECALL,
    ) -> None:
        """Prepare the traces.

        Args:
            num_experts: E.
            k: experts per token, at most E.
            layers: number of independent traces.
            seed: the same seed gives the same ids.
            uniform: all experts equally popular, the worst case for a cache.
            recall: share of the ids that ``predict`` foresees, at least 0.5.
        """
        exponent = 0.0 if uniform else ZIPF_EXPONENT
        self._k = k
        self._recall = recall
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

    def predict(self, layer: int, rows: int) -> npt.NDArray[np.int32]:
        """What a predictor would say before ``ids`` is asked the same; ``recall`` of it comes true.

        The surest guesses come first: their chance falls in a line from nearly 1, so that the mean is ``recall``. The
        trained model's falls likewise, from 0.99 to 0.53 of its six. Wrong ids are experts that are popular now.

        Returns:
            int32 [R, k], distinct within a row.
        """
        return self._layers[layer].predict(rows, self._k, self._recall)


class _Layer:
    """The trace of one layer, made in chunks because the popularities move between chunks."""

    def __init__(self, num_experts: int, exponent: float, seed: list[int]) -> None:
        self._random = np.random.default_rng(seed)
        self._guesses = np.random.default_rng([*seed, 1])  # of its own: predicting changes no trace
        self._rarity = rarity(num_experts, exponent, self._random)
        self._ready = np.empty((0, 0), np.int32)
        self._foreseen = np.empty((0, 0), np.int32)  # of the next rows, as far as it was asked for

    def take(self, rows: int, k: int) -> npt.NDArray[np.int32]:
        taken = self._peek(rows, k).copy()
        self._ready = self._ready[rows:]
        self._foreseen = self._foreseen[rows:]
        return taken

    def predict(self, rows: int, k: int, recall: float) -> npt.NDArray[np.int32]:
        if len(self._foreseen) < rows:  # many rows at once: a step that is timed should not wait for its guesses
            self._foreseen = self._guess(self._peek(max(rows, len(self._ready)), k), recall)
        return self._foreseen[:rows].copy()

    def _guess(self, true: npt.NDArray[np.int32], recall: float) -> npt.NDArray[np.int32]:
        rows, k = true.shape
        waits = self._guesses.standard_exponential((rows, len(self._rarity)), dtype=np.float32) * self._rarity
        np.put_along_axis(waits, true, np.inf, axis=1)
        wrong = np.argpartition(waits, k - 1, axis=1)[:, :k]
        chance = 1.0 - (1.0 - recall) * (2 * np.arange(k) + 1) / k  # [k]
        return np.where(self._guesses.random(true.shape) < chance, true, wrong).astype(np.int32)

    def _peek(self, rows: int, k: int) -> npt.NDArray[np.int32]:
        """The next tokens, which stay the next ones."""
        parts = [self._ready.reshape(-1, k)]
        have = len(parts[0])
        while have < rows:
            parts.append(self._chunk(k))
            have += CHUNK
        self._ready = np.concatenate(parts)
        return self._ready[:rows]

    def _chunk(self, k: int) -> npt.NDArray[np.int32]:
        drift(self._rarity, self._random)
        return draw(self._rarity, CHUNK, k, self._random)
