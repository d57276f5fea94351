"""The physical ceilings: what disk, memory and arithmetic give on this machine at best."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestream.config import format_size
from moestream.errors import BackendError, CheckpointError

SMALL, LARGE = 1_000_000 // 4096 * 4096, 8_000_000 // 4096 * 4096
PROBE_THREADS = 8
MEMORY_BYTES = SCRATCH_BYTES = 1 << 28  # far more than any cache of the processor
INSTALL = (
    "install a C++20 compiler (Debian: apt-get install g++; macOS: xcode-select --install), then reinstall moestream"
)


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Random reads of one file, 8 in flight, in bytes per second."""

    direct: bool
    """False: the file system refuses direct reads, so the figures may be those of the page cache."""
    small: float
    """Reads of 1 MB."""
    large: float
    """Reads of 8 MB."""


@dataclass(frozen=True, slots=True)
class ComputeRates:
    """Memory and arithmetic with the given threads."""

    threads: int
    memory: float
    """Bytes per second of sequential reads."""
    int8: float
    """Integer operations per second (multiply and add count as two)."""
    fma: float
    """Float32 operations per second."""


def native() -> Any:
    """The native module.

    Raises:
        BackendError: it was not built; the message says how to get it.
    """
    try:
        return importlib.import_module("moestream._native")
    except ImportError as error:
        raise BackendError(f"the native module is not installed: {INSTALL} ({error})") from error


def active_isa() -> str:
    """The instruction set that the kernels use.

    Raises:
        BackendError: the native module was not built, or MOESTREAM_ISA names no instruction set.
    """
    try:
        return str(native().active_isa())
    except ValueError as error:
        raise BackendError(str(error)) from error


def compute_rates(threads: int) -> ComputeRates:
    """Probe memory and arithmetic with ``threads`` threads, for about a second.

    Runs in a process of its own, so that the memory it reads does not count as memory of this one.

    Raises:
        BackendError: the native module is not installed.
    """
    native()
    code = f"from moestream.bench.ceilings import probe_compute; print(*probe_compute({threads}))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    memory, int8, fma = map(float, output.split())
    return ComputeRates(threads, memory, int8, fma)


def mean_rates(a: ComputeRates, b: ComputeRates) -> ComputeRates:
    """The mean of two probes with the same threads."""
    return ComputeRates(a.threads, (a.memory + b.memory) / 2, (a.int8 + b.int8) / 2, (a.fma + b.fma) / 2)


def probe_compute(threads: int) -> tuple[float, float, float]:
    """Bytes, int8 operations and float32 operations per second."""
    module = native()
    module.set_threads(threads)
    return module.memory_bandwidth(MEMORY_BYTES, 0.4), module.int8_peak(0.2), module.fma_peak(0.2)


def disk_rates(file: Path, seconds: float) -> DiskRates:
    """Probe a file with each read size for ``seconds``.

    Raises:
        CheckpointError: the file cannot be read or is smaller than 8 MB.
    """
    module = native()
    try:
        reader = module.Reader(1)
        direct = bool(reader.is_direct(reader.open(str(file), True)))
        reader.close()
        small, large = (module.probe_read(str(file), n, seconds, direct, PROBE_THREADS) for n in (SMALL, LARGE))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot probe the disk with {file}: {error}") from error
    return DiskRates(direct, small, large)


@contextmanager
def probe_file(files: Sequence[Path]) -> Iterator[Path]:
    """The largest of a checkpoint's files, or a temporary file beside it if that is too small to tell anything.

    Raises:
        CheckpointError: no file can be written where the small checkpoint lies, nor in the working directory.
    """
    largest = max(files, key=lambda file: file.stat().st_size)
    if largest.stat().st_size >= SCRATCH_BYTES:
        yield largest
        return
    folder = largest.parent if os.access(largest.parent, os.W_OK) else Path()
    with scratch_file(folder) as file:
        yield file


@contextmanager
def scratch_file(folder: Path) -> Iterator[Path]:
    """A temporary file of random bytes that is on the disk, not only in the page cache.

    Raises:
        CheckpointError: the folder cannot be written, or the disk has less than twice the room.
    """
    try:
        free = shutil.disk_usage(folder).free
        if free < 2 * SCRATCH_BYTES:
            raise CheckpointError(
                f"{folder}: {format_size(free)} free, the disk probe needs {format_size(2 * SCRATCH_BYTES)}; "
                "name another folder"
            )
        handle, name = tempfile.mkstemp(prefix=".moestream-probe-", dir=folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write a file to probe the disk: {error}") from error
    path = Path(name)
    try:
        block = os.urandom(8 << 20)  # random: some devices shortcut zeros
        with os.fdopen(handle, "wb") as file:
            for _ in range(0, SCRATCH_BYTES, len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        yield path
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write a file to probe the disk: {error}") from error
    finally:
        path.unlink(missing_ok=True)
