"""States after a prefix of tokens, kept so that another sequence can start from there.

Keys and values never change once written, so they are kept in pages that snapshots share. A delta-net state changes
with every token and cannot be cut back: a snapshot holds a copy of it as it was after the last token.

Shape letters: as in ``ops/base.py``; additionally L attention layers, P tokens of a page.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moestream.models.states import SequenceStates
from moestream.ops.base import DeltaState, KVCache

PAGE = 64
Page = npt.NDArray[Any]
"""Keys and values [L, 2, Hkv, P, D] of P consecutive tokens; only the last page of a snapshot may hold fewer."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What a sequence remembers after ``length`` tokens."""

    length: int
    pages: tuple[Page, ...]
    deltas: tuple[DeltaState, ...]  # one per delta-net layer

    @property
    def deltas_nbytes(self) -> int:
        """Bytes that no other snapshot shares."""
        return sum(d.conv.nbytes + d.s.nbytes for d in self.deltas)


def take(states: SequenceStates, length: int, deltas: tuple[DeltaState, ...]) -> Snapshot:
    """Copy the first ``length`` tokens out of a sequence that has seen at least as many.

    Full pages that an earlier snapshot of the sequence made, or that it was started from, are shared while they live.

    Args:
        states: The sequence.
        length: Tokens of the snapshot.
        deltas: Copies of its delta-net states after ``length`` tokens, see ``SequenceStates.marks``.
    """
    caches = [c for c in states.layers if isinstance(c, KVCache)]
    pages: list[Page] = []
    for i, start in enumerate(range(0, length if caches else 0, PAGE)):
        end = min(start + PAGE, length)
        page = states.pages[i]() if end - start == PAGE and i < len(states.pages) else None
        if page is None:
            page = np.stack([np.stack([c.k[:, start:end], c.v[:, start:end]]) for c in caches])
            if end - start == PAGE:
                states.pages[i : i + 1] = [weakref.ref(page)]
        pages.append(page)
    return Snapshot(length, tuple(pages), deltas)


def start_from(states: SequenceStates, snapshot: Snapshot, length: int) -> None:
    """Make a new sequence stand ``length`` tokens into a snapshot; fewer than all only without delta-nets."""
    states.reserve(length)
    caches = [c for c in states.layers if isinstance(c, KVCache)]
    for i, page in enumerate(snapshot.pages[: -(-length // PAGE)]):
        start, end = i * PAGE, min((i + 1) * PAGE, length)
        for cache, (k, v) in zip(caches, page, strict=True):
            cache.k[:, start:end] = k[:, : end - start]
            cache.v[:, start:end] = v[:, : end - start]
        if end - start == PAGE:  # a page that is cut will get other rows
            states.pages.append(weakref.ref(page))
    for cache in caches:
        cache.length = length
    for state, kept in zip(states.delta_states(), snapshot.deltas, strict=True):
        state.conv[:], state.s[:] = kept.conv, kept.s
    states.length = length
