"""A fixed array of slots in one anonymous memory, and loading of what stays resident.

A direct read lands its bytes at an address congruent to the file offset modulo ``BLOCK`` and overwrites the rest of the
first and last block, so every byte range gets an area of ``area_nbytes(nbytes)``: whatever the skew, it fits.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.encoding import Extent
from moestream.errors import ReadError
from moestream.experts.reader import BLOCK, DEST, FILE, NBYTES, OFFSET, TICKET, Reader, read_error

U8 = npt.NDArray[np.uint8]
HUGE = 2 << 20
# Linux frees the pages at once; elsewhere that advice only lets the system swap them, and MADV_FREE lets it take them.
_GIVE_BACK: int | None = getattr(mmap, "MADV_DONTNEED" if sys.platform == "linux" else "MADV_FREE", None)
LOAD_PIECE = 64 << 20
"""Bytes per ticket when loading: large enough to fill any disk, small enough for a smooth progress bar."""


def area_nbytes(nbytes: int) -> int:
    """Bytes to reserve for a range of ``nbytes`` read at any offset."""
    return (nbytes + BLOCK - 1) // BLOCK * BLOCK + BLOCK


def allocate(nbytes: int) -> U8:
    """Anonymous memory aligned to 2 MiB, in huge pages where there are any; pages are only taken when written.

    Direct reads into huge pages are 2 to 3 times as fast: fewer pages to pin for each read.
    """
    memory, start = _map(nbytes)
    return np.frombuffer(memory, np.uint8)[start : start + nbytes]


def _map(nbytes: int) -> tuple[mmap.mmap, int]:
    """What ``allocate`` gives, as a mapping and where in it the aligned bytes start."""
    memory = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared has no huge pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    if hasattr(mmap, "MADV_DONTFORK"):  # a fork during a direct read would leave the bytes in the wrong copy of a page
        memory.madvise(mmap.MADV_DONTFORK)
    return memory, -np.frombuffer(memory, np.uint8).ctypes.data % HUGE


class Arena:
    """``slots`` slots of ``slot_nbytes`` bytes each (rounded up to whole blocks) in one memory.

    Attributes:
        memory: All slots as one array of bytes [slots * slot_nbytes].
        slot_nbytes: Distance between slots.
    """

    def __init__(self, slots: int, slot_nbytes: int) -> None:
        self.slots = slots
        self.slot_nbytes = (slot_nbytes + BLOCK - 1) // BLOCK * BLOCK
        self._map, self._start = _map(slots * self.slot_nbytes)
        self.memory: U8 = np.frombuffer(self._map, np.uint8)[self._start :][: slots * self.slot_nbytes]
        self.address = self.memory.ctypes.data

    def move(self, moves: Iterable[tuple[int, int]]) -> None:
        """Copy slots, (from, to), in this order."""
        slots = self.memory.reshape(self.slots, self.slot_nbytes)
        for source, target in moves:
            slots[target] = slots[source]

    def discard(self, slots: Iterable[int]) -> None:
        """Give the memory of slots whose bytes nobody needs back to the system; it is taken again when written.

        Neighbours are given back together: the system gets little of a huge page that is used in part.
        """
        ordered = np.array(sorted(slots), np.int64)
        for run in np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1) if ordered.size else ():
            first = self._start + int(run[0]) * self.slot_nbytes
            start = first + -first % mmap.PAGESIZE
            whole = (first + run.size * self.slot_nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if whole > 0 and _GIVE_BACK is not None:
                self._map.madvise(_GIVE_BACK, start, whole)


def load_extents(
    reader: Reader,
    files: Sequence[Path],
    extents: Sequence[Extent],
    direct: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[U8]:
    """Read extents into one new allocation and return each as an array of its bytes (any alignment).

    No reads of others may be outstanding on ``reader``. ``progress`` is called with the bytes that arrived since the
    last call.

    Raises:
        ReadError: a file cannot be opened or read; names file, offset and reason.
    """
    areas = np.cumsum([0, *(area_nbytes(e.nbytes) for e in extents)])
    memory = allocate(int(areas[-1]))
    ids = {f: reader.open(files[f], direct) for f in sorted({e.file for e in extents})}
    starts = [int(area) + e.offset % BLOCK for area, e in zip(areas, extents, strict=False)]
    rows = [
        (ids[e.file], e.offset + at, min(LOAD_PIECE, e.nbytes - at), memory.ctypes.data + start + at)
        for e, start in zip(extents, starts, strict=True)
        for at in range(0, e.nbytes, LOAD_PIECE)
    ]
    batch = np.empty((len(rows), 5), np.int64)
    batch[:, (FILE, OFFSET, NBYTES, DEST)] = np.array(rows, np.int64).reshape(-1, 4)
    batch[:, TICKET] = np.arange(len(rows))
    reader.attach(memory)
    reader.submit(batch)
    errors: list[ReadError] = []
    remaining = len(rows)
    while remaining:
        done, failed = reader.wait(1, 0.5)
        remaining -= len(done) + len(failed)
        errors += (read_error(reader, f) for f in failed)
        if progress is not None and done:
            progress(int(batch[done, NBYTES].sum()))
    reader.detach(memory)
    if errors:
        raise errors[0]
    return [memory[s : s + e.nbytes] for s, e in zip(starts, extents, strict=True)]
