"""The C++ reader, and the choice between it and the Python one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moestream.errors import BackendError, ReadError
from moestream.experts.python_reader import PythonReader
from moestream.experts.reader import I64, U8, Reader, ReaderCounters, ReadFailure

_native: Any
try:
    _native = importlib.import_module("moestream._native")
except ImportError:  # the pure-Python install
    _native = None


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

    def limit_prefetch(self, reads: int) -> None:
        """See ``Reader``."""
        self._reader.limit_prefetch(reads)

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


def make_reader(threads: int = 8) -> Reader:
    """The native reader where it is installed, else the Python one."""
    return NativeReader(threads) if _native is not None else PythonReader(min(threads, 4))
