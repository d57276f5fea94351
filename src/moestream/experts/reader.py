"""Reading batches of byte ranges: the interface; ``native_reader.py`` and ``python_reader.py`` do it.

A batch is an int64 array ``[n, 5]`` with the columns file id, offset, nbytes, destination address and ticket. Rows with
the same ticket belong together; the ticket is reported by ``wait`` when all of them have arrived, or with the first
failure among them once none is being read any more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moestream.errors import ReadError

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

BLOCK = 4096
"""Direct reads move whole blocks of this size."""
FILE, OFFSET, NBYTES, DEST, TICKET = range(5)
"""Columns of a batch."""


@dataclass(frozen=True, slots=True)
class ReadFailure:
    """Why a ticket has no bytes."""

    ticket: int
    code: int
    """errno, or 0 when the file ended before the range."""
    file: int
    offset: int
    """Where the read stopped."""


@dataclass(frozen=True, slots=True)
class ReaderCounters:
    """What a reader did since it was made."""

    bytes_asked: int = 0
    bytes_disk: int = 0
    """Moved by reads that may touch the disk; whole blocks for direct files."""
    bytes_cached: int = 0
    """Served at once by the page cache (known for buffered files on Linux)."""
    reads: int = 0
    errors: int = 0
    """Tickets that failed."""
    busy_seconds: float = 0.0
    """Time with at least one read in flight."""


class Reader(Protocol):
    """Reads ranges of files into attached memory. One consumer at a time submits and waits."""

    def open(self, path: Path, direct: bool) -> int:
        """Open a file and return its id.

        ``direct`` bypasses the page cache where the file system allows it (see ``is_direct``); destinations must then
        be congruent to the file offset modulo ``BLOCK``, and up to a block before and after them is overwritten.

        Raises:
            ReadError: the file cannot be opened; the message names it.
        """

    def path(self, file: int) -> Path:
        """Path of an open file."""

    def size(self, file: int) -> int:
        """Bytes in an open file."""

    def is_direct(self, file: int) -> bool:
        """Whether reads bypass the page cache now."""

    def attach(self, memory: U8) -> None:
        """Allow reads into ``memory`` (contiguous) and keep it alive."""

    def detach(self, memory: U8) -> None:
        """Undo ``attach``.

        Raises:
            ValueError: reads are outstanding.
        """

    def submit(self, ranges: I64, prefetch: bool = False) -> None:
        """Queue a batch [n, 5]; demand reads go before prefetch reads.

        Raises:
            ValueError: a row is not a readable range of attached memory; nothing was queued.
        """

    def limit_prefetch(self, reads: int) -> None:
        """Let no more than so many prefetch reads run at a time: a demand read has to wait for them.

        Raises:
            ValueError: ``reads`` is below 1.
        """

    def wait(self, min_count: int, timeout: float) -> tuple[list[int], list[ReadFailure]]:
        """Return tickets finished since the last call.

        Waits for ``min_count`` tickets, or all outstanding ones if they are fewer, but at most ``timeout`` seconds.
        """

    def promote(self, tickets: Sequence[int]) -> None:
        """Read what is queued of these prefetch tickets before all else; any other ticket is left alone."""

    def cancel(self, tickets: Sequence[int]) -> None:
        """Drop what is queued of these prefetch tickets; those that lose a read fail with ``errno.ECANCELED``."""

    def cancel_prefetch(self) -> None:
        """The same for all prefetch tickets."""

    def outstanding(self) -> int:
        """Tickets submitted and not finished."""

    def counters(self) -> ReaderCounters:
        """What was done so far."""

    def close(self) -> None:
        """Drop queued reads, wait for running ones, end the threads."""


def read_error(reader: Reader, failure: ReadFailure) -> ReadError:
    """Turn a failure into an error that names file, offset and reason."""
    path = reader.path(failure.file)
    if not failure.code:
        return ended_early(path, failure.offset, reader.size(failure.file))
    return ReadError(f"{path}: cannot read at offset {failure.offset}: {os.strerror(failure.code)}")


def ended_early(path: Path, offset: int, nbytes: int) -> ReadError:
    """The error for a file of ``nbytes`` that should reach beyond an offset."""
    reason = f"the file ends there ({nbytes} bytes): it is truncated or still being written"
    return ReadError(f"{path}: cannot read at offset {offset}: {reason}")
