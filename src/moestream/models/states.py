"""What a sequence remembers between steps: a KV cache per attention layer, a fixed state per delta-net layer.

Shape letters: as in ``ops/base.py``.
"""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt

from moestream.models.config import ModelConfig
from moestream.ops.base import DeltaState, KVCache

FIRST_CAPACITY = 64  # tokens
FLOAT32_BYTES = 4
LINE = 64  # bytes; vector loads that cross one cost twice


class SequenceStates:
    """States of one sequence, one per layer. Not thread-safe; its memory goes with the object.

    Attributes:
        layers: ``KVCache`` or ``DeltaState`` of each layer.
        length: tokens seen so far.
        marks: lengths, ascending and still ahead, at which delta-net states are to be copied into ``marked``.
        marked: copies of the delta-net states after so many tokens, in the order of the layers.
        pages: for ``snapshots.py``: the full pages of this sequence that a snapshot has made or brought.
    """

    def __init__(self, config: ModelConfig, exact: bool, limit: int | None = None) -> None:
        """Start an empty sequence.

        Args:
            config: the model.
            exact: float32 KV cache instead of float16.
            limit: tokens the sequence is planned for; the KV capacity stops doubling there (it still grows if needed).
        """
        self.length = 0
        self.marks: tuple[int, ...] = ()
        self.marked: dict[int, list[DeltaState]] = {}
        self.pages: list[weakref.ref[npt.NDArray[np.floating]]] = []
        self._limit = config.max_positions if limit is None else limit
        self.layers: list[KVCache | DeltaState] = []
        for plan in config.layers:
            if plan.mixer == "attention":
                shape = (config.attention.kv_heads, 0, config.attention.head_dim)
                dtype = np.float32 if exact else np.float16
                self.layers.append(KVCache(np.zeros(shape, dtype), np.zeros(shape, dtype)))
            elif config.delta_net is not None:
                d = config.delta_net
                conv = np.zeros((d.conv_width - 1, d.channels), np.float32)
                s = np.zeros((d.value_heads, d.key_dim, d.value_dim), np.float32)
                self.layers.append(DeltaState(conv, s))

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more; capacity doubles so that copies stay rare."""
        needed = self.length + tokens
        for cache in self.layers:
            if isinstance(cache, KVCache) and cache.k.shape[1] < needed:
                doubled = max(2 * cache.k.shape[1], FIRST_CAPACITY)
                capacity = max(needed, min(doubled, self._limit))
                cache.k = _grown(cache.k, cache.length, capacity)
                cache.v = _grown(cache.v, cache.length, capacity)

    def copy_from(self, other: SequenceStates) -> None:
        """Stand, empty so far, where another sequence stands."""
        self.reserve(other.length)
        for own, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(own, KVCache) and isinstance(theirs, KVCache):
                n = own.length = theirs.length
                own.k[:, :n], own.v[:, :n] = theirs.k[:, :n], theirs.v[:, :n]
            elif isinstance(own, DeltaState) and isinstance(theirs, DeltaState):
                own.conv[:], own.s[:] = theirs.conv, theirs.s
        self.pages = list(other.pages)
        self.length = other.length

    def delta_states(self) -> list[DeltaState]:
        """The states of the delta-net layers, in order."""
        return [s for s in self.layers if isinstance(s, DeltaState)]

    def mark(self, state: DeltaState, length: int) -> None:
        """A delta-net layer's state has seen ``length`` tokens; keep a copy if that is wanted."""
        if length in self.marks:
            self.marked.setdefault(length, []).append(copy_of(state))

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(
            s.k.nbytes + s.v.nbytes if isinstance(s, KVCache) else s.conv.nbytes + s.s.nbytes for s in self.layers
        )


def copy_of(state: DeltaState) -> DeltaState:
    """A copy that the sequence does not change any more."""
    return DeltaState(state.conv.copy(), state.s.copy())


def _grown(old: npt.NDArray[np.floating], length: int, capacity: int) -> npt.NDArray[np.floating]:
    shape = old.shape[0], capacity, old.shape[2]  # [Hkv, capacity, D]
    nbytes = int(np.prod(shape)) * old.itemsize
    memory = np.zeros(nbytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    new = memory[start : start + nbytes].view(old.dtype).reshape(shape)
    new[:, :length] = old[:, :length]
    return new


def nbytes_per_token(config: ModelConfig, exact: bool) -> int:
    """Bytes each token adds to a sequence's states."""
    layers = sum(plan.mixer == "attention" for plan in config.layers)
    itemsize = 4 if exact else 2
    return layers * 2 * config.attention.kv_heads * config.attention.head_dim * itemsize


def nbytes_fixed(config: ModelConfig) -> int:
    """Bytes of a sequence's states that do not grow."""
    d = config.delta_net
    if d is None:
        return 0
    layers = sum(plan.mixer == "delta_net" for plan in config.layers)
    values = (d.conv_width - 1) * d.channels + d.value_heads * d.key_dim * d.value_dim
    return layers * values * FLOAT32_BYTES
