"""Routers for random weights that prefer some experts, so that peers route as our imposed traces do.

Random router weights choose all experts equally often, which no trained model does. A program that cannot be told what
to choose can still be given weights that choose as we like: some channels of the hidden state are reserved. The
embedding fills them (one block with a constant, the others with the token's random codes), no layer ever writes to
them, and routers read nothing else. RMS norm scales all channels of a token alike, so a router's order of experts is

    order of  W z + b     z: the token's codes, W random, b the preference

whatever the layers compute. ``b`` is chosen so that the share of tokens that use an expert follows Zipf's law as in
``moestream.checkpoint.routing``, whose LRU hit rates are those published for a trained 512-expert model. Unlike there,
preferences stay the same from token to token: a token of ``llama-bench`` is random and knows no time. Ours is given
ids drawn from the same distribution, and guesses at them of which 70 % come true (the routers above would allow 100 %).

Shape letters: R rows (tokens), E experts, k experts per token, C reserved channels, Z of them with codes.
"""

from __future__ import annotations

from collections import OrderedDict
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.routing import RECALL

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

BLOCK = 32
"""Channels of the constant: one block of the 4-bit formats."""
CODES = 16
CODE_STD = ((CODES**2 - 1) / 12) ** 0.5
ZIPF = {"skewed": 1.24, "uniform": 0.0}
"""Exponents by name; 1.24: an LRU of 1/8 of 512 experts hits about 67 % of top-10 choices, one of 1/4 about 80 %."""


def reserved_channels(hidden: int) -> int:
    """C: 256, or half of a small hidden state."""
    return min(256, hidden // 2 // BLOCK * BLOCK)


def shares(num_experts: int, k: int, exponent: float) -> npt.NDArray[np.float64]:
    """The share of tokens that use each expert, most popular first; sums to k.

    That of k draws without replacement from Zipf's law, in the approximation of independent waiting times.

    Returns:
        float64 [E].
    """
    rate = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    low, high = 0.0, 1e12
    for _ in range(200):
        time = (low + high) / 2
        low, high = (time, high) if (1 - np.exp(-rate * time)).sum() < k else (low, time)
    return 1 - np.exp(-rate * low)


class PeerRouter:
    """The routers of all layers: as weights for a file, and as traces of expert ids."""

    def __init__(self, num_experts: int, k: int, hidden: int, routing: str = "skewed", seed: int = 0) -> None:
        """Choose the preferences.

        Args:
            num_experts: E.
            k: experts per token.
            hidden: width of the hidden state.
            routing: a key of ``ZIPF``.
            seed: the same seed gives the same routers.
        """
        self.experts, self.k, self.hidden, self.seed = num_experts, k, hidden, seed
        self.reserved = reserved_channels(hidden)
        share = np.clip(shares(num_experts, k, ZIPF[routing]), 1e-9, 1 - 1e-6)
        self._preference = np.array([NormalDist().inv_cdf(p) for p in share], np.float32)  # [E], in deviations of W z

    def _layer(self, layer: int) -> tuple[F32, F32]:
        """W [E, Z] for codes of deviation 1, and b [E]."""
        random = np.random.default_rng([self.seed, layer])
        codes = self.reserved - BLOCK
        weights = random.standard_normal((self.experts, codes), np.float32) / np.float32(codes**0.5)
        return weights, random.permutation(self._preference)

    def weights(self, layer: int, constant: float) -> F32:
        """The router matrix of a layer, for embeddings of this constant and unit codes: [E, hidden]."""
        matrix = np.zeros((self.experts, self.hidden), np.float32)
        weights, preference = self._layer(layer)
        matrix[:, :BLOCK] = preference[:, None] / np.float32(BLOCK * constant)
        matrix[:, BLOCK : self.reserved] = weights
        return matrix

    def choose(self, layer: int, codes: F32) -> I32:
        """The experts of tokens with these unit codes [R, Z]: int32 [R, k], in no order."""
        weights, preference = self._layer(layer)
        logits = codes @ weights.T + preference
        return np.argpartition(-logits, self.k - 1, axis=1)[:, : self.k].astype(np.int32)

    def trace(self, layer: int, rows: int, seed: int = 0) -> I32:
        """The experts of random tokens: int32 [R, k]."""
        random = np.random.default_rng([self.seed, layer, 1 + seed])
        codes = random.integers(0, CODES, (rows, self.reserved - BLOCK)).astype(np.float32)
        return self.choose(layer, (codes - np.float32((CODES - 1) / 2)) / np.float32(CODE_STD))


class Replay:
    """Traces made beforehand, handed out row by row: what ``model.router_override`` takes, at no cost worth naming."""

    def __init__(self, router: PeerRouter, layers: int, rows: int, seed: int = 0) -> None:
        self._traces = [router.trace(layer, rows, seed) for layer in range(layers)]
        self._guesses = [foreseen(trace, RECALL, layer) for layer, trace in enumerate(self._traces)]
        self._next = [0] * layers

    def ids(self, layer: int, rows: int) -> I32:
        """The experts of the next tokens of a layer: int32 [rows, k]; starts again at the end."""
        start = self._start(layer, rows)
        self._next[layer] = start + rows
        return self._traces[layer][start : start + rows]

    def predict(self, layer: int, rows: int) -> I32:
        """What reading ahead of the router would go by: the next ``ids``, of which a share of RECALL comes true."""
        start = self._start(layer, rows)
        return self._guesses[layer][start : start + rows]

    def _start(self, layer: int, rows: int) -> int:
        start = self._next[layer]
        return start if start + rows <= len(self._traces[layer]) else 0


def foreseen(trace: I32, recall: float, seed: int) -> I32:
    """Guesses at a trace [R, k]: the surest first, as in ``SyntheticRouter.predict``; wrong ones are other tokens'."""
    random = np.random.default_rng(seed)
    rows, k = trace.shape
    chance = 1.0 - (1.0 - recall) * (2 * np.arange(k) + 1) / k  # [k]
    others = trace[random.integers(rows, size=rows)]
    return np.where(random.random(trace.shape) < chance, trace, others)


def lru_hit_rate(trace: I32, slots: int, skip: int = 200) -> float:
    """Share of a layer's choices that an LRU of ``slots`` experts holds, after the first ``skip`` tokens."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for row, experts in enumerate(trace.tolist()):
        for expert in experts:
            if expert in held:
                held.move_to_end(expert)
                hits += row >= skip
            else:
                held[expert] = None
                if len(held) > slots:
                    held.popitem(last=False)
    return hits / (trace[skip:].size or 1)
