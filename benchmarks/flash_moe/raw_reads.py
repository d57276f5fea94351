"""Claims: parallel preads are 9x sequential ones, mmap is 5x slower cold, 2 MB-aligned buffers are 3.6x faster warm.

Reads ranges of one expert's size (7.08 MB) at random block-aligned places of a large file, one range per call.
A fourth table reads the small ranges that checkpoints store an expert's scales in (128 KB), where depth does matter.
Cold means that the file's pages were dropped from the page cache before each measurement (``posix_fadvise``, no root).
"""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import common
import numpy as np
import numpy.typing as npt

from moestream import _native

U8 = npt.NDArray[np.uint8]
BLOCK = 4096
HUGE = 2 << 20
SMALL = 128 << 10
NBYTES = -(-common.EXPERT_NBYTES // BLOCK) * BLOCK
WARM_EXPERTS = 24
"""Experts read again and again where the page cache is measured (170 MB)."""
FLIGHTS = (1, 2, 4, 8, 16)


def buffer(skew: int = 0, huge: bool = True) -> U8:
    """Touched anonymous memory whose address is ``skew`` bytes past a 2 MB boundary, with or without huge pages."""
    memory = mmap.mmap(-1, NBYTES + 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % HUGE + skew
    array[start : start + NBYTES] = 1
    return array[start : start + NBYTES]


def together(flight: int, work: Callable[[int], None]) -> float:
    """Seconds until ``flight`` threads have done ``work(number)``; the GIL is free while they read or copy."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(flight)]
    start = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return perf_counter() - start


class Reads:
    """Random reads of one file."""

    def __init__(self, file: Path, gigabytes: float) -> None:
        self.file = file
        self.places = file.stat().st_size // NBYTES
        self.number = max(16, int(gigabytes * common.GB / NBYTES))
        if self.places < self.number:
            raise SystemExit(f"{file} is too small: {self.number * NBYTES} bytes are needed; lower --gigabytes")
        self.random = random.Random(0)

    def cold(self, flight: int, direct: bool) -> float:
        """GB/s of preads from the disk, ``flight`` under way."""
        common.forget(self.file)
        return self._pread(self._anywhere(), [buffer() for _ in range(flight)], direct)

    def warm(self, target: U8) -> float:
        """GB/s of sequential preads that the page cache serves."""
        window = [i * NBYTES for i in range(WARM_EXPERTS)]
        self._pread(window, [target], direct=False)
        return self._pread(self.random.choices(window, k=8 * WARM_EXPERTS), [target], direct=False)

    def direct(self, target: U8) -> float:
        """GB/s of direct reads into one buffer, one after another."""
        return self._pread(self._anywhere(), [target], direct=True)

    def _anywhere(self) -> list[int]:
        return [i * NBYTES for i in self.random.sample(range(self.places), self.number)]

    def _pread(self, offsets: list[int], targets: list[U8], direct: bool) -> float:
        descriptor = os.open(self.file, os.O_RDONLY | (os.O_DIRECT if direct else 0))

        def work(number: int) -> None:
            for offset in offsets[number :: len(targets)]:
                if os.preadv(descriptor, [targets[number]], offset) != NBYTES:
                    raise SystemExit(f"{self.file}: short read at {offset}")

        try:
            return len(offsets) * NBYTES / together(len(targets), work) / common.GB
        finally:
            os.close(descriptor)

    def small(self, flight: int) -> float:
        """GB/s of direct reads of 128 KB by native threads."""
        return float(_native.probe_read(str(self.file), SMALL, 0.5, True, flight)) / common.GB

    def mapped(self, flight: int, advice: int) -> float:
        """GB/s of copying cold ranges out of a mapping of the whole file."""
        common.forget(self.file)
        offsets, targets = self._anywhere(), [buffer() for _ in range(flight)]
        with open(self.file, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        mapping.madvise(advice)
        source = np.frombuffer(mapping, np.uint8)

        def work(number: int) -> None:
            for offset in offsets[number::flight]:
                targets[number][:] = source[offset : offset + NBYTES]

        return len(offsets) * NBYTES / together(flight, work) / common.GB


def main() -> None:
    """Tables, then the JSON line."""
    parser = common.arguments(__doc__, 3)
    parser.add_argument("model", type=Path, help="folder with a weight file of 2 GB or more")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="bytes of one measurement (default %(default)s)")
    args = parser.parse_args()
    file = common.largest_file(args.model)
    reads = Reads(file, args.gigabytes)
    before = common.disk_rate(file) / common.GB

    parallel = common.interleave(
        {
            f"{kind} {n}": lambda n=n, d=kind == "direct": reads.cold(n, d)
            for kind in ("direct", "buffered")
            for n in FLIGHTS
        },
        args.rounds,
    )
    maps = common.interleave(
        {
            "pread, 1 thread": lambda: reads.cold(1, False),
            "pread, 8 threads": lambda: reads.cold(8, False),
            "mmap, 1 thread": lambda: reads.mapped(1, mmap.MADV_NORMAL),
            "mmap, 8 threads": lambda: reads.mapped(8, mmap.MADV_NORMAL),
            "mmap random, 1 thread": lambda: reads.mapped(1, mmap.MADV_RANDOM),
            "mmap random, 8 threads": lambda: reads.mapped(8, mmap.MADV_RANDOM),
        },
        args.rounds,
    )
    targets = {
        "2 MB-aligned, huge pages": buffer(),
        "16 KB-aligned, huge pages": buffer(16 << 10),
        "2 MB-aligned, small pages": buffer(huge=False),
        "16 KB-aligned, small pages": buffer(16 << 10, huge=False),
    }
    base = "16 KB-aligned, small pages"
    warm = common.interleave({name: lambda t=t: reads.warm(t) for name, t in targets.items()}, args.rounds)
    direct = common.interleave({name: lambda t=t: reads.direct(t) for name, t in targets.items()}, args.rounds)
    small = common.interleave({f"{n} in flight": lambda n=n: reads.small(n) for n in FLIGHTS}, args.rounds)
    common.forget(file)

    ceiling = (before + common.disk_rate(file) / common.GB) / 2
    print(f"ceiling: {ceiling:.2f} GB/s (random direct reads of 8 MB, 8 in flight, before and after)")
    print("reads in flight, cold")
    print("\n".join(common.table(parallel, "direct 1", "GB/s", ceiling)))
    print("mmap against pread, buffered, cold")
    print("\n".join(common.table(maps, "pread, 1 thread", "GB/s", ceiling)))
    print("destination of one read at a time, page cache")
    print("\n".join(common.table(warm, base, "GB/s")))
    print("destination of one read at a time, direct")
    print("\n".join(common.table(direct, base, "GB/s", ceiling)))
    print("ranges of 128 KB, direct")
    print("\n".join(common.table(small, "1 in flight", "GB/s", ceiling)))
    groups = {"parallel": parallel, "small": small, "mmap": maps, "aligned_warm": warm, "aligned_direct": direct}
    common.report(
        "parallel preads 9x, mmap 5x slower, 2 MB-aligned buffers",
        {"disk_GB_s": ceiling, **{name: common.medians(group) for name, group in groups.items()}},
    )


if __name__ == "__main__":
    main()
