"""Where the experts of one layer lie on disk and within a slot, as rows of a batch that a reader takes.

Shape letters: E experts of the layer, P parts of an expert, G ranges of one expert on disk, m experts of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moestream.checkpoint.encoding import ExpertLayout, ExpertTable
from moestream.errors import TensorError
from moestream.experts.arena import Arena, area_nbytes
from moestream.experts.reader import BLOCK, DEST, FILE, NBYTES, OFFSET, Reader
from moestream.ops.base import I64


class LayerPlan:
    """One layer's experts, prepared so that a submit is one fancy index.

    Parts that follow each other on disk for every expert are read as one range.

    Attributes:
        first_key: The key of expert 0; the others follow.
        rows: The ranges of each expert [E, G, 5], destinations counted from the start of a slot.
        part_offsets: Where each part will lie within a slot [E, P].
    """

    def __init__(self, layer: int, first_key: int, table: ExpertTable) -> None:
        self.layer = layer
        self.layout: ExpertLayout = table.layout
        self.num_experts = table.num_experts
        self.first_key = first_key
        file, offset, nbytes = (table.ranges[:, :, i] for i in range(3))  # [E, P] each
        if not np.array_equal(nbytes, np.broadcast_to(np.array(table.layout.part_nbytes), nbytes.shape)):
            raise TensorError(f"layer {layer}: expert parts on disk do not have the sizes of {table.layout}")
        joins = (file[:, 1:] == file[:, :-1]) & (offset[:, 1:] == offset[:, :-1] + nbytes[:, :-1])
        heads = np.flatnonzero(np.concatenate([[True], ~joins.all(axis=0)]))  # [G], first part of each range
        sizes = np.add.reduceat(nbytes[0], heads)  # [G]
        areas = np.cumsum([0, *(area_nbytes(int(size)) for size in sizes)])
        self.slot_nbytes = int(areas[-1])

        dest = areas[:-1] + offset[:, heads] % BLOCK  # [E, G], within a slot
        self.rows = np.zeros((table.num_experts, len(heads), 5), np.int64)
        self.rows[:, :, FILE] = file[:, heads]
        self.rows[:, :, OFFSET] = offset[:, heads]
        self.rows[:, :, NBYTES] = sizes
        self.rows[:, :, DEST] = dest
        group = np.searchsorted(heads, np.arange(nbytes.shape[1]), side="right") - 1  # [P], range of each part
        self.part_offsets: I64 = dest[:, group] + offset - offset[:, heads[group]]

    def ranges(self, keys: list[int], slots: list[int], arena: Arena) -> I64:
        """The reads [m, G, 5] that bring experts into slots."""
        ranges: I64 = self.rows[np.array(keys) - self.first_key]  # a copy
        ranges[:, :, DEST] += (np.array(slots, np.int64) * arena.slot_nbytes + arena.address)[:, None]
        return ranges

    def disk_nbytes(self, direct: bool) -> list[int]:
        """Bytes the disk moves for each expert: whole blocks for direct reads."""
        start, end = self.rows[:, :, OFFSET], self.rows[:, :, OFFSET] + self.rows[:, :, NBYTES]
        if direct:
            start, end = start // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK
        nbytes: list[int] = (end - start).sum(axis=1).tolist()
        return nbytes


def slot_nbytes(tables: Sequence[ExpertTable | None]) -> int:
    """Bytes of a slot that can hold any expert of any layer."""
    return max((LayerPlan(i, 0, t).slot_nbytes for i, t in enumerate(tables) if t is not None), default=BLOCK)


def open_files(reader: Reader, files: Sequence[Path], plans: Sequence[LayerPlan], direct: bool) -> list[int]:
    """Open the files that hold experts, put the reader's ids of them into the plans' rows, and return these.

    Raises:
        ReadError: a file cannot be opened.
    """
    used = sorted({int(file) for plan in plans for file in np.unique(plan.rows[:, :, FILE])})
    ids = np.full(len(files), -1, np.int64)
    for file in used:
        ids[file] = reader.open(files[file], direct)
    for plan in plans:
        plan.rows[:, :, FILE] = ids[plan.rows[:, :, FILE]]
    opened: list[int] = ids[used].tolist()
    return opened
