"""Real files with known bytes, and a reader that misbehaves on purpose."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestream.checkpoint.encoding import Encoding, ExpertLayout, ExpertTable, MatrixLayout
from moestream.experts.reader import TICKET, Reader, ReaderCounters, ReadFailure

AFFINE = Encoding("affine", 4, 32, "bf16")


def layout(width: int, hidden: int = 64, encoding: Encoding = AFFINE) -> ExpertLayout:
    gate = MatrixLayout(width, hidden, encoding)
    return ExpertLayout(gate, gate, MatrixLayout(hidden, width, encoding))


@dataclass
class Disk:
    """A checkpoint of experts only."""

    files: list[Path]
    tables: list[ExpertTable | None]

    def truth(self, layer: int, expert: int, part: int) -> bytes:
        file, offset, nbytes = self.tables[layer].ranges[expert, part].tolist()
        with self.files[file].open("rb") as f:
            f.seek(offset)
            return f.read(nbytes)


def write_stacked(folder: Path, layouts: list[ExpertLayout | None], experts: int, seed: int = 0) -> Disk:
    """Like MLX: one stack [E, ...] per part, at odd offsets, in two files that end with the last expert's bytes."""
    rng = np.random.default_rng(seed)
    data: list[list[np.ndarray]] = [[], []]
    sizes = [0, 0]
    tables: list[ExpertTable | None] = []
    for shape in layouts:
        if shape is None:
            tables.append(None)
            continue
        ranges = np.empty((experts, len(shape.part_nbytes), 3), np.int64)
        for part, nbytes in enumerate(shape.part_nbytes):
            file = part % 2
            gap = int(rng.integers(1, 5000))
            stack = rng.integers(0, 256, gap + experts * nbytes, dtype=np.uint8)
            ranges[:, part, 0] = file
            ranges[:, part, 1] = sizes[file] + gap + np.arange(experts) * nbytes
            ranges[:, part, 2] = nbytes
            data[file].append(stack)
            sizes[file] += stack.size
        tables.append(ExpertTable(shape, ranges))
    files = [folder / "a.bin", folder / "b.bin"]
    for path, pieces in zip(files, data, strict=True):
        path.write_bytes(np.concatenate(pieces).tobytes())
    return Disk(files, tables)


def write_packed(folder: Path, shape: ExpertLayout, experts: int) -> Disk:
    """All parts of an expert behind each other."""
    rng = np.random.default_rng(1)
    start = 777
    sizes = np.array(shape.part_nbytes)
    ranges = np.zeros((experts, sizes.size, 3), np.int64)
    ranges[:, :, 1] = start + np.arange(experts)[:, None] * sizes.sum() + np.cumsum(sizes) - sizes
    ranges[:, :, 2] = sizes
    path = folder / "packed.bin"
    path.write_bytes(rng.integers(0, 256, start + experts * int(sizes.sum()), dtype=np.uint8).tobytes())
    return Disk([path], [ExpertTable(shape, ranges)])


Fault = Callable[[int, int], int | None]
"""(file, offset) of a range -> errno, 0 for a short read, None for a good one."""


class FaultyReader:
    """Delegates to a real reader; fails chosen ranges, holds finished tickets back and reports them out of order."""

    def __init__(self, inner: Reader, fault: Fault = lambda file, offset: None, shuffle: bool = False, seed: int = 0):
        self.inner = inner
        self.fault = fault
        self.shuffle = shuffle
        self.batches: list[np.ndarray] = []
        self._random = random.Random(seed)
        self._memory: list[np.ndarray] = []
        self._held: list[int] = []
        self._failed: list[ReadFailure] = []

    def submit(self, ranges, prefetch=False):
        self.batches.append(ranges.copy())
        failures = {}
        for file, offset, nbytes, dest, ticket in ranges.tolist():
            code = self.fault(file, offset)
            if code is not None and ticket not in failures:
                failures[ticket] = ReadFailure(ticket, code, file, offset + nbytes // 2)
                self._scribble(dest, nbytes // 2)
        self._failed += failures.values()
        good = ranges[[t not in failures for t in ranges[:, TICKET].tolist()]]
        if len(good):
            self.inner.submit(good, prefetch)

    def _scribble(self, dest: int, nbytes: int) -> None:
        """What a failed read leaves behind."""
        for memory in self._memory:
            start = dest - memory.ctypes.data
            if 0 <= start < memory.nbytes:
                memory[start : start + nbytes] = 0xA5

    def wait(self, min_count, timeout):
        if not self.shuffle:
            done, failed = self.inner.wait(min_count - len(self._failed), timeout)
            failed, self._failed = failed + self._failed, []
            return done, failed
        done, failed = self.inner.wait(self.inner.outstanding(), 10.0)
        self._held += done
        self._failed += failed
        self._random.shuffle(self._held)
        self._random.shuffle(self._failed)
        count = self._random.randint(1, 3)
        done, self._held = self._held[:count], self._held[count:]
        count = self._random.randint(0 if done else 1, 1)
        failed, self._failed = self._failed[:count], self._failed[count:]
        return done, failed

    def outstanding(self):
        return self.inner.outstanding() + len(self._held) + len(self._failed)

    def open(self, path, direct):
        return self.inner.open(path, direct)

    def path(self, file):
        return self.inner.path(file)

    def size(self, file):
        return self.inner.size(file)

    def is_direct(self, file):
        return self.inner.is_direct(file)

    def attach(self, memory):
        self._memory.append(memory)
        self.inner.attach(memory)

    def detach(self, memory):
        self.inner.detach(memory)

    def limit_prefetch(self, reads):
        self.inner.limit_prefetch(reads)

    def promote(self, tickets):
        self.inner.promote(tickets)

    def cancel(self, tickets):
        self.inner.cancel(tickets)

    def cancel_prefetch(self):
        self.inner.cancel_prefetch()

    def counters(self) -> ReaderCounters:
        return self.inner.counters()

    def close(self):
        self.inner.close()


def fail_ranges(targets: set[tuple[int, int]], code: int = errno.EIO, times: int = 1 << 30) -> Fault:
    """Fail each (file, offset) the first ``times`` times it is read."""
    left = dict.fromkeys(targets, times)

    def fault(file: int, offset: int) -> int | None:
        if left.get((file, offset), 0) <= 0:
            return None
        left[file, offset] -= 1
        return code

    return fault
