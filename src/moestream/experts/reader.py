"""Reading batches of byte ranges: the interface, the native reader and a slow pure-Python one.

A batch is an int64 array ``[n, 5]`` with the columns file id, offset, nbytes, destination address and ticket. Rows with
the same ticket belong together; the ticket is reported by ``wait`` when all of them have arrived, or with the first
failure among them once none is being read any more.
"""

from __future__ import annotations

import errno
import importlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moestream.errors import BackendError, ReadError

_native: Any
try:
    _native = importlib.import_module("moestream._native")
except ImportError:  # the pure-Python install
    _native = None

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
    if failure.code:
        reason = os.strerror(failure.code)
    else:
        reason = f"the file ends there ({reader.size(failure.file)} bytes): it is truncated or still being written"
    return ReadError(f"{path}: cannot read at offset {failure.offset}: {reason}")


class NativeReader:
    """The C++ thread pool (native/io/reader.h).

    Raises:
        BackendError: the native module is not installed.
    """

    def __init__(self, threads: int = 8) -> None:
        if _native is None:
            raise BackendError(
                "the native reader is not installed: install a C++ compiler and run `pip install .` again"
            )
        self._reader = _native.Reader(threads)
        self._paths: list[Path] = []
        self._memory: dict[int, U8] = {}

    def open(self, path: Path, direct: bool) -> int:
        """See ``Reader``."""
        try:
            file: int = self._reader.open(str(path), direct)
        except OSError as error:
            raise ReadError(f"{path}: cannot open: {error.strerror}") from error
        self._paths.append(path)
        return file

    def path(self, file: int) -> Path:
        """See ``Reader``."""
        return self._paths[file]

    def size(self, file: int) -> int:
        """See ``Reader``."""
        return int(self._reader.size(file))

    def is_direct(self, file: int) -> bool:
        """See ``Reader``."""
        return bool(self._reader.is_direct(file))

    def attach(self, memory: U8) -> None:
        """See ``Reader``."""
        address = memory.ctypes.data
        self._reader.attach(address, memory.nbytes)
        self._memory[address] = memory

    def detach(self, memory: U8) -> None:
        """See ``Reader``."""
        self._reader.detach(memory.ctypes.data)
        del self._memory[memory.ctypes.data]

    def submit(self, ranges: I64, prefetch: bool = False) -> None:
        """See ``Reader``."""
        self._reader.submit(ranges, prefetch)

    def wait(self, min_count: int, timeout: float) -> tuple[list[int], list[ReadFailure]]:
        """See ``Reader``."""
        done, failed = self._reader.wait(min_count, timeout)
        return done, [ReadFailure(*f) for f in failed] if failed else []

    def promote(self, tickets: Sequence[int]) -> None:
        """See ``Reader``."""
        self._reader.promote(tickets)

    def cancel(self, tickets: Sequence[int]) -> None:
        """See ``Reader``."""
        self._reader.cancel(tickets)

    def cancel_prefetch(self) -> None:
        """See ``Reader``."""
        self._reader.cancel_prefetch()

    def outstanding(self) -> int:
        """See ``Reader``."""
        return int(self._reader.outstanding())

    def counters(self) -> ReaderCounters:
        """See ``Reader``."""
        c = self._reader.counters()
        return ReaderCounters(c.bytes_asked, c.bytes_disk, c.bytes_cached, c.reads, c.errors, c.busy_seconds)

    def close(self) -> None:
        """See ``Reader``."""
        self._reader.close()
        self._memory.clear()


@dataclass(slots=True)
class _Ticket:
    """What is left of one ticket."""

    remaining: int = 0
    failure: ReadFailure | None = None


class PythonReader:
    """A few Python threads with buffered ``os.preadv``: slow (the threads share the GIL), needs no compiler."""

    def __init__(self, threads: int = 4) -> None:
        self._fds: list[int] = []
        self._paths: list[Path] = []
        self._memory: list[tuple[int, U8]] = []
        self._demand: deque[list[int]] = deque()
        self._prefetch: deque[list[int]] = deque()
        self._tickets: dict[int, _Ticket] = {}
        self._done: list[int] = []
        self._failed: list[ReadFailure] = []
        self._condition = threading.Condition()
        self._closed = False
        self._in_flight = 0
        self._busy_since = 0.0
        self._asked = self._disk = self._reads = self._errors = 0
        self._busy = 0.0
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def open(self, path: Path, direct: bool) -> int:
        """See ``Reader``; always buffered."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ReadError(f"{path}: cannot open: {error.strerror}") from error
        self._fds.append(fd)
        self._paths.append(path)
        return len(self._fds) - 1

    def path(self, file: int) -> Path:
        """See ``Reader``."""
        return self._paths[file]

    def size(self, file: int) -> int:
        """See ``Reader``."""
        return os.fstat(self._fds[file]).st_size

    def is_direct(self, file: int) -> bool:
        """See ``Reader``: never."""
        return False

    def attach(self, memory: U8) -> None:
        """See ``Reader``."""
        with self._condition:
            self._memory.append((memory.ctypes.data, memory))

    def detach(self, memory: U8) -> None:
        """See ``Reader``."""
        with self._condition:
            if self._tickets:
                raise ValueError("memory cannot be detached while reads are outstanding")
            self._memory = [m for m in self._memory if m[0] != memory.ctypes.data]

    def submit(self, ranges: I64, prefetch: bool = False) -> None:
        """See ``Reader``."""
        rows = ranges.tolist()
        with self._condition:
            if self._closed:
                raise ValueError("the reader is closed")
            for i, row in enumerate(rows):
                self._check(i, row)
            for row in rows:
                self._tickets.setdefault(row[TICKET], _Ticket()).remaining += 1
                self._asked += row[NBYTES]
            (self._prefetch if prefetch else self._demand).extend(rows)
            self._condition.notify_all()

    def _check(self, i: int, row: Sequence[int]) -> None:
        file, offset, nbytes, dest, ticket = row
        if not 0 <= file < len(self._fds):
            raise ValueError(f"row {i}: no open file has id {file}")
        if offset < 0 or nbytes < 1:
            raise ValueError(f"row {i}: offset and nbytes are not a range")
        if ticket in self._tickets:
            raise ValueError(f"ticket {ticket} is already outstanding")
        if not any(base <= dest and dest + nbytes <= base + memory.nbytes for base, memory in self._memory):
            raise ValueError(f"row {i}: destination is outside the attached memory")

    def wait(self, min_count: int, timeout: float) -> tuple[list[int], list[ReadFailure]]:
        """See ``Reader``."""
        with self._condition:
            wanted = min(min_count, len(self._done) + len(self._failed) + len(self._tickets))
            self._condition.wait_for(lambda: self._closed or len(self._done) + len(self._failed) >= wanted, timeout)
            result = self._done, self._failed
            self._done, self._failed = [], []
            return result

    def promote(self, tickets: Sequence[int]) -> None:
        """See ``Reader``."""
        with self._condition:
            self._demand.extendleft(reversed(self._take_prefetch(set(tickets))))

    def cancel(self, tickets: Sequence[int]) -> None:
        """See ``Reader``."""
        with self._condition:
            for row in self._take_prefetch(set(tickets)):
                self._finish(row, ReadFailure(row[TICKET], errno.ECANCELED, row[FILE], row[OFFSET]))

    def cancel_prefetch(self) -> None:
        """See ``Reader``."""
        with self._condition:
            self.cancel([row[TICKET] for row in self._prefetch])

    def _take_prefetch(self, tickets: set[int]) -> list[list[int]]:
        """Remove the queued prefetch reads of some tickets, in order."""
        taken = [row for row in self._prefetch if row[TICKET] in tickets]
        self._prefetch = deque(row for row in self._prefetch if row[TICKET] not in tickets)
        return taken

    def outstanding(self) -> int:
        """See ``Reader``."""
        with self._condition:
            return len(self._tickets)

    def counters(self) -> ReaderCounters:
        """See ``Reader``."""
        with self._condition:
            busy = self._busy + (time.perf_counter() - self._busy_since if self._in_flight else 0.0)
            return ReaderCounters(self._asked, self._disk, 0, self._reads, self._errors, busy)

    def close(self) -> None:
        """See ``Reader``."""
        with self._condition:
            self._closed = True
            self._demand.clear()
            self._prefetch.clear()
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._tickets.clear()
        self._memory.clear()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self._demand or self._prefetch)
                if self._closed:
                    return
                row = (self._demand or self._prefetch).popleft()
                if self._in_flight == 0:
                    self._busy_since = time.perf_counter()
                self._in_flight += 1
                base, memory = next(m for m in self._memory if m[0] <= row[DEST] < m[0] + m[1].nbytes)
            got, failure = self._read(row, memory[row[DEST] - base : row[DEST] - base + row[NBYTES]])
            with self._condition:
                self._disk += got
                self._reads += 1
                self._in_flight -= 1
                if self._in_flight == 0:
                    self._busy += time.perf_counter() - self._busy_since
                self._finish(row, failure)

    def _read(self, row: Sequence[int], target: U8) -> tuple[int, ReadFailure | None]:
        file, offset, nbytes, _, ticket = row
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(self._fds[file], [target[done:].data], offset + done)
            except OSError as error:
                return done, ReadFailure(ticket, error.errno or errno.EIO, file, offset + done)
            if got == 0:
                return done, ReadFailure(ticket, 0, file, offset + done)
            done += got
        return done, None

    def _finish(self, row: Sequence[int], failure: ReadFailure | None) -> None:
        ticket = self._tickets[row[TICKET]]
        ticket.failure = ticket.failure or failure
        ticket.remaining -= 1
        if ticket.remaining:
            return
        del self._tickets[row[TICKET]]
        if ticket.failure is None:
            self._done.append(row[TICKET])
        else:
            self._errors += ticket.failure.code != errno.ECANCELED
            self._failed.append(ticket.failure)
        self._condition.notify_all()


def make_reader(threads: int = 8) -> Reader:
    """The native reader where it is installed, else the Python one."""
    return NativeReader(threads) if _native is not None else PythonReader(min(threads, 4))
