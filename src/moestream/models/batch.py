"""What one forward pass works on: rows of several sequences, and where each sequence's rows lie.

Shape letters: T rows of the batch, N rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moestream.errors import ReadError
from moestream.models.states import SequenceStates
from moestream.ops.base import I32

BLOCK = 256
"""Rows that mixers take at a time: matrices are decoded once for so many, and more would make long pieces."""
ALIGNED = 64
"""Blocks are multiples of it, as delta-nets work in chunks of so many rows."""

SEEN = 1 << 20
"""Rows times tokens before them that attention takes at a time, down to ``ALIGNED`` rows."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The consecutive rows ``start .. start + length`` of a batch that belong to one sequence."""

    states: SequenceStates
    start: int
    length: int

    def parts(self, rows: slice) -> list[slice]:
        """Some of its rows, in pieces that take attention about as long whatever it has seen."""
        seen = self.states.length + rows.stop - self.start
        size = max(ALIGNED, SEEN // seen // ALIGNED * ALIGNED)
        return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]

    def cuts(self, rows: slice) -> list[int]:
        """Of its rows, where a recurrent layer begins, must stop because its state is wanted, and ends."""
        shift = self.start - self.states.length
        marks = [m + shift for m in self.states.marks if rows.start < m + shift < rows.stop]
        return [rows.start, *marks, rows.stop]


@dataclass(slots=True)
class Batch:
    """Rows of one forward pass. ``failures`` is filled by it; the states advance with it."""

    ids: I32  # [T]
    positions: I32  # [T]
    segments: tuple[Segment, ...]
    logits_rows: I32  # [N]
    failures: list[tuple[int, ReadError]] = field(default_factory=list)
    """(row, error): an expert that the row needed could not be read, so its logits are worthless."""
    on_layer: Callable[[int, int], None] | None = None
    """Called with (layers done, layers) after each layer."""

    @property
    def decodes(self) -> bool:
        """Whether it is one row of each sequence."""
        return len(self.ids) == len(self.segments)

    def blocks(self) -> list[list[tuple[Segment, slice]]]:
        """The rows in blocks of about ``BLOCK``, each as the rows of its segments in order."""
        count = -(-len(self.ids) // BLOCK)
        if count <= 1:
            return [[(s, slice(s.start, s.start + s.length)) for s in self.segments]]
        size = -(-len(self.ids) // (count * ALIGNED)) * ALIGNED
        blocks = []
        for start in range(0, len(self.ids), size):
            parts = [(s, slice(max(s.start, start), min(s.start + s.length, start + size))) for s in self.segments]
            blocks.append([(s, rows) for s, rows in parts if rows.start < rows.stop])
        return blocks

    @classmethod
    def of(cls, chunks: Sequence[tuple[Sequence[int] | I32, SequenceStates]], all_logits: bool = False) -> Batch:
        """Lay out the next tokens of some sequences, each going on where its states stand.

        Args:
            chunks: next ids of each sequence and its states.
            all_logits: logits of every row instead of the last row of each sequence.
        """
        segments, ids, positions = [], [], []
        start = 0
        for tokens, states in chunks:
            segments.append(Segment(states, start, len(tokens)))
            ids.append(np.asarray(tokens, dtype=np.int32))
            positions.append(np.arange(states.length, states.length + len(tokens), dtype=np.int32))
            start += len(tokens)
        last = np.array([s.start + s.length - 1 for s in segments], dtype=np.int32)
        rows = np.arange(start, dtype=np.int32) if all_logits else last
        return cls(np.concatenate(ids), np.concatenate(positions), tuple(segments), rows)
