"""What this machine, and the part of it that we may use, looks like. Linux (cgroup v1 and v2) and macOS."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

KEPT_SHARE = 0.15
KEPT_AT_MOST = 1_500_000_000
"""Bytes. Of the available memory this share stays free when no budget is given, and no more than this."""
ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of memory."""

    total: int
    """Of the machine."""
    available: int
    """That this process could still take without swapping or exceeding its cgroup; includes reclaimable page cache."""
    cgroup_limit: int | None
    """None: no cgroup limits us below ``total``."""


@dataclass(frozen=True, slots=True)
class FileSystem:
    """Where a path lies."""

    kind: str
    """``ext4``, ``apfs``, ...; empty if unknown."""
    device: str
    mount: Path
    total: int
    free: int
    """Bytes that this user may write."""


def cpu_count(root: Path = ROOT) -> int:
    """CPUs this process may use: its affinity, capped by the CPU quota of its cgroups, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroup_folders("cpu", root):
        quota = _cpu_quota(folder)
        if quota is not None:
            count = min(count, math.ceil(quota))
    return max(1, count)


def cpu_name(root: Path = ROOT) -> str:
    """The processor's marketing name, or its architecture."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return name or platform.machine()
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.machine()


def memory(root: Path = ROOT) -> Memory:
    """Memory of the machine and what is left for this process."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    limit: int | None = None
    for folder in _cgroup_folders("memory", root):
        own = _first_int(folder / "memory.max", folder / "memory.limit_in_bytes")
        if own is None or own >= total:
            continue
        limit = own if limit is None else min(limit, own)
        used = _first_int(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
        available = min(available, max(0, own - used + _page_cache(folder)))
    return Memory(total, available, limit)


def rss() -> int:
    """Bytes of memory this process occupies now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """The most memory this process has occupied so far, in bytes."""
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):  # ru_maxrss would also count the parent's memory at the time of the fork
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def kept_free(available: int) -> int:
    """Bytes of what is available that stay free when the user names no budget; caches give way to who needs more."""
    return min(int(available * KEPT_SHARE), KEPT_AT_MOST)


def default_budget() -> int:
    """Bytes for the whole process when the user names none: what it has, and most of what is left."""
    available = memory().available
    return rss() + available - kept_free(available)


def trim_heap() -> None:
    """Give the system back what the C library keeps of freed memory, where it can be told to (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def file_system(path: Path) -> FileSystem:
    """The file system that holds ``path``.

    Raises:
        OSError: the path does not exist.
    """
    real = path.resolve(strict=True)
    usage = psutil.disk_usage(str(real))
    mounts = {Path(p.mountpoint): p for p in psutil.disk_partitions(all=True)}  # later mounts hide earlier ones
    for folder in (real, *real.parents):
        if folder in mounts:
            found = mounts[folder]
            return FileSystem(found.fstype, found.device, folder, usage.total, usage.free)
    return FileSystem("", "", Path(real.anchor), usage.total, usage.free)


def _cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's cgroup and all above it, which limit it too; version 2 and 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / name for name in dict.fromkeys((controllers, controller))]
        else:
            continue
        relative = Path(path.lstrip("/"))
        for mount in mounts:  # inside a container the path may be the host's: only what exists counts
            for folder in (relative, *relative.parents):
                if (mount / folder).is_dir():
                    yield mount / folder


def _cpu_quota(folder: Path) -> float | None:
    """CPUs' worth of time that a cgroup may use."""
    words = _read(folder / "cpu.max").split()
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    quota = _first_int(folder / "cpu.cfs_quota_us")
    period = _first_int(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


def _page_cache(folder: Path) -> int:
    """Bytes of a cgroup's use that are files the kernel can drop."""
    fields = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines())
    prefix = "total_" if "total_inactive_file" in fields else ""  # version 1 counts children apart
    return sum(int(fields.get(prefix + name, 0)) for name in ("active_file", "inactive_file"))


def _first_int(*files: Path) -> int | None:
    """The number in the first file that holds one; ``max`` and missing files hold none."""
    for file in files:
        text = _read(file).strip()
        if text.lstrip("-").isdigit():
            return int(text)
    return None


def _read(file: Path) -> str:
    """Text of a file that may not exist."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
