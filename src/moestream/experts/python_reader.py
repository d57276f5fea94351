"""A reader without native code."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moestream.errors import ReadError
from moestream.experts.reader import DEST, FILE, I64, NBYTES, OFFSET, TICKET, U8, ReaderCounters, ReadFailure


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
        self._prefetching, self._most_prefetching = 0, threads
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

    def limit_prefetch(self, reads: int) -> None:
        """See ``Reader``."""
        if reads < 1:
            raise ValueError("at least one prefetch read must be allowed")
        with self._condition:
            self._most_prefetching = reads
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
            self._condition.notify_all()  # the limit of prefetch reads may have kept threads from them

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
                self._condition.wait_for(lambda: self._closed or self._demand or self._may_prefetch())
                if self._closed:
                    return
                ahead = not self._demand
                row = (self._demand or self._prefetch).popleft()
                self._prefetching += ahead
                if self._in_flight == 0:
                    self._busy_since = time.perf_counter()
                self._in_flight += 1
                base, memory = next(m for m in self._memory if m[0] <= row[DEST] < m[0] + m[1].nbytes)
            got, failure = self._read(row, memory[row[DEST] - base : row[DEST] - base + row[NBYTES]])
            with self._condition:
                self._disk += got
                self._reads += 1
                self._in_flight -= 1
                self._prefetching -= ahead
                if self._in_flight == 0:
                    self._busy += time.perf_counter() - self._busy_since
                self._finish(row, failure)

    def _may_prefetch(self) -> bool:
        return bool(self._prefetch) and self._prefetching < self._most_prefetching

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
