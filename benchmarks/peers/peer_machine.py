"""The machine around a measurement: what a process reads and computes, page cache, read-ahead, memory, ceilings.

Linux only. Dropping the page cache and changing the read-ahead need root; without it both stay as they are and the
caller is told.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from moestream.bench.ceilings import compute_rates, disk_rates, probe_file

SECTOR = 512
PERIOD = 0.05
DISK_SECONDS = 0.7
TICKS = os.sysconf("SC_CLK_TCK")


Sample = tuple[float, float, float, float, float]
"""Moment; until then: bytes read, seconds that reads took in sum, processor seconds of the process, of others."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What happened between two moments."""

    seconds: float
    bytes_read: float
    """From the block device, by anybody."""
    in_flight: float
    """Reads under way on average. (Linux counts the time a device is busy in ticks of up to 4 ms, each read at least
    one: a program that reads 2 ms out of 7 looks busy nearly always.)"""
    cores: float
    """Processor time of the process, user and system, per second."""
    others: float
    """User time of all other processes and time taken by the hypervisor, per second."""


def block_device(path: Path) -> Path | None:
    """The sysfs folder of the device that holds a file; None where there is none (overlay, tmpfs, network)."""
    number = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    return folder.resolve() if folder.exists() else None


class Sampler(threading.Thread):
    """Looks at a process and a device 20 times a second until the process ends; ``between`` interpolates."""

    def __init__(self, pid: int, device: Path | None) -> None:
        super().__init__(daemon=True)
        self._pid, self._device = pid, device
        self._samples: list[Sample] = []
        self.start()

    def run(self) -> None:
        """Sample until the process is gone."""
        while (sample := self._sample()) is not None:
            self._samples.append(sample)
            time.sleep(PERIOD)

    def _sample(self) -> Sample | None:
        try:
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
            everybody = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        if fields[0] in "ZX":
            return None
        now = time.monotonic()
        disk = (self._device / "stat").read_text().split() if self._device else ["0"] * 11
        user, kernel = int(fields[11]), int(fields[12])
        others = int(everybody[0]) + int(everybody[1]) + int(everybody[7]) - user  # user, nice, steal
        return now, float(disk[2]) * SECTOR, float(disk[3]) / 1e3, (user + kernel) / TICKS, others / TICKS

    def between(self, start: float, end: float) -> Usage:
        """Usage from ``start`` to ``end`` on the monotonic clock."""
        a, b = self._at(start), self._at(end)
        seconds = max(end - start, 1e-9)
        nbytes, reading, mine, others = (y - x for x, y in zip(a, b, strict=True))
        return Usage(seconds, nbytes, reading / seconds, mine / seconds, others / seconds)

    def _at(self, when: float) -> list[float]:
        samples = list(self._samples)
        i = bisect_left(samples, (when,))
        if i in (0, len(samples)):
            return list(samples[min(i, len(samples) - 1)][1:])
        (t0, *low), (t1, *high) = samples[i - 1], samples[i]
        share = (when - t0) / (t1 - t0)
        return [a + (b - a) * share for a, b in zip(low, high, strict=True)]


def drop_caches() -> bool:
    """Write everything back and empty the page cache; False where we may not."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def read_ahead_file(path: Path) -> Path | None:
    """Where the kernel keeps the read-ahead of the device that holds a file, in KB."""
    device = block_device(path)
    if device is None:
        return None
    places = (device / "queue/read_ahead_kb", device.parent / "queue/read_ahead_kb")
    return next((place for place in places if place.exists()), None)


@contextmanager
def read_ahead(path: Path, kb: int | None) -> Iterator[int | None]:
    """Another read-ahead for the device of ``path`` while the block runs; None changes nothing. Gives what holds.

    Raises:
        SystemExit: it cannot be changed.
    """
    file = read_ahead_file(path)
    before = int(file.read_text()) if file else None
    if kb is None or kb == before:
        yield before
        return
    if file is None:
        raise SystemExit(f"{path}: lies on no block device of its own; its read-ahead cannot be changed")
    try:
        file.write_text(str(kb))
    except OSError as error:
        raise SystemExit(f"{file}: changing the read-ahead needs root; leave out --read-ahead ({error})") from error
    try:
        yield kb
    finally:
        file.write_text(str(before))


HOLD = """
import mmap, sys
size = int(sys.argv[1])
memory = mmap.mmap(-1, size)
for start in range(0, size, 4096):
    memory[start] = 1
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def withhold(nbytes: int) -> Iterator[None]:
    """Another process holds this much memory while the block runs; without swap it stays where it is.

    Raises:
        SystemExit: there is not that much.
    """
    if not nbytes:
        yield
        return
    if psutil.swap_memory().total:
        print("note: this machine has swap, so withheld memory may be swapped out", file=sys.stderr)
    size = nbytes // mmap.PAGESIZE * mmap.PAGESIZE
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin
        assert holder.stdout
        try:
            if holder.stdout.readline().strip() != "held":
                raise SystemExit(f"--withhold: could not hold {nbytes / 1e9:.1f} GB of memory")
            yield
        finally:
            holder.stdin.close()


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine gives at one moment; bytes and operations per second."""

    disk: float
    """Random direct reads of 8 MB, 8 in flight."""
    memory: float
    int8: float


def ceilings(file: Path, threads: int) -> Ceilings:
    """Probe disk, memory and arithmetic, about three seconds."""
    with probe_file([file]) as probed:
        disk = disk_rates(probed, DISK_SECONDS)
    compute = compute_rates(threads)
    return Ceilings(disk.large, compute.memory, compute.int8)


def mean(probes: Sequence[Ceilings]) -> Ceilings:
    """The mean of several probes."""
    n = len(probes)
    return Ceilings(sum(p.disk for p in probes) / n, sum(p.memory for p in probes) / n, sum(p.int8 for p in probes) / n)
