"""Safetensors headers from strangers, and a streaming writer.

The rules are those of the reference implementation (https://github.com/huggingface/safetensors): a little-endian u64
header length of at most 100 MB, a UTF-8 JSON object without duplicate keys, and extents that cover the rest of the file
exactly, so a hole, an overlap or trailing bytes are errors. Nothing is mapped and nothing is unpickled.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.encoding import Extent
from moestream.errors import CheckpointError, HeaderError, ReadError, TensorError

MAX_HEADER_BYTES = 100_000_000
MAX_ELEMENTS = 2**63 - 1
STAGE_BYTES = 16 << 20

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class TensorEntry(NamedTuple):
    """One tensor of a file, checked to lie inside it. A tuple, because a checkpoint may have 276,000 of them."""

    name: str
    dtype: str
    """Safetensors name, a key of ``DTYPE_BITS``."""
    shape: tuple[int, ...]
    file: int
    """Index into ``Checkpoint.files``."""
    offset: int
    """Absolute in the file."""
    nbytes: int

    @property
    def extent(self) -> Extent:
        """Its byte range."""
        return Extent(self.file, self.offset, self.nbytes)


@dataclass(frozen=True, slots=True)
class Header:
    """What one file holds."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def pread_exact(path: Path, offset: int, nbytes: int) -> bytearray:
    """Read exactly ``nbytes`` at ``offset``.

    Raises:
        ReadError: the file cannot be read or ends early; names file, offset and errno.
    """
    buffer = bytearray(nbytes)
    view = memoryview(buffer)
    done = 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while done < nbytes:
                got = file.readinto(view[done:])
                if not got:
                    raise ReadError(f"{path}: file ends after {done} of {nbytes} bytes at offset {offset}")
                done += got
    except OSError as error:
        raise ReadError(f"{path}: reading {nbytes} bytes at offset {offset} failed: {error}") from error
    return buffer


def regular_file_size(path: Path) -> int:
    """Size of a file, following links.

    Raises:
        CheckpointError: it is missing, unreadable, or not a regular file (opening a pipe would block forever).
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file")
    return status.st_size


def parse_json(raw: bytes | bytearray, where: str, error: type[CheckpointError], unique: bool = True) -> dict[str, Any]:
    """Parse untrusted bytes as a JSON object.

    Args:
        raw: UTF-8 text.
        where: what the messages start with.
        error: what is raised.
        unique: reject duplicate keys at every level.

    Raises:
        CheckpointError: of the class ``error``: invalid UTF-8 or JSON, nesting too deep, not an object, duplicate keys.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{where}: duplicate key {_short(twice)}")
        return result

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{where}: not valid UTF-8 at byte {cause.start}") from cause
    try:
        value = json.loads(text, object_pairs_hook=without_duplicates if unique else None)
    except (ValueError, RecursionError) as cause:  # ValueError: also an integer of more than 4300 digits
        raise error(f"{where}: not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{where}: must be a JSON object, is {type(value).__name__}")
    return value


def read_header(path: Path, file: int = 0) -> Header:
    """Read and check the header of one safetensors file.

    Args:
        path: the file; a link to a regular file is followed.
        file: the number its entries carry in ``TensorEntry.file``.

    Returns:
        Its tensors in header order (every extent lies inside the file) and its ``__metadata__``.

    Raises:
        HeaderError: the header is malformed, or the extents leave a hole, overlap, or do not end where the file ends.
        TensorError: a tensor's dtype, shape or extent is wrong, for example past the end of a truncated file.
        CheckpointError: the file cannot be opened.
        ReadError: the disk failed.
    """
    size = regular_file_size(path)
    if size < 8:
        raise HeaderError(f"{path}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(pread_exact(path, 0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"{path}: header length {length} exceeds the limit of {MAX_HEADER_BYTES} bytes")
    start = 8 + length
    if start > size:
        raise HeaderError(f"{path}: header of {length} bytes runs past the end of the file ({size} bytes)")
    raw = parse_json(pread_exact(path, 8, length), f"{path}: header", HeaderError)
    metadata = _check_metadata(path, raw.pop("__metadata__", {}))
    tensors: dict[str, TensorEntry] = {}
    for name, info in raw.items():
        if not name.isprintable():  # lone surrogates and control characters break whatever prints the name later
            raise HeaderError(f"{path}: tensor name {_short(name)} holds unprintable characters")
        try:
            tensors[name] = _entry(name, info, file, start, size)
        except CheckpointError as error:
            raise type(error)(f"{path}: tensor {_short(name)}{error}") from None
    _check_cover(path, list(tensors.values()), start, size)
    return Header(tensors, metadata)


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    """``__metadata__`` as an object of strings."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{path}: __metadata__ must be an object of strings")
    return metadata


def _entry(name: str, info: Any, file: int, start: int, size: int) -> TensorEntry:
    """One tensor; the data begins at ``start`` in a file of ``size`` bytes.

    Raises:
        CheckpointError: without the start of its message, which the caller knows.
    """
    if not isinstance(info, dict):
        raise HeaderError(f" must be an object, is {type(info).__name__}")
    try:
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    except KeyError as missing:
        raise HeaderError(f": field {missing} is missing") from None
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise TensorError(f": unknown dtype {_short(dtype)}")
    elements = 1
    for n in shape if isinstance(shape, list) else [None]:
        if type(n) is not int or n < 0:
            raise TensorError(f": shape {_short(shape)} is not a list of non-negative integers")
        elements *= n
        if elements > MAX_ELEMENTS:
            raise TensorError(f": shape {_short(shape)} overflows 64 bits")
    begin, end = offsets if isinstance(offsets, list) and len(offsets) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int or begin < 0 or end < 0:
        raise TensorError(f": data_offsets {_short(offsets)} are not two non-negative integers")
    if begin > end:
        raise TensorError(f": data_offsets {_short(offsets)} begin after they end")
    if start + end > size:
        raise TensorError(
            f": data_offsets {_short(offsets)} end past the end of the file ({size} bytes); "
            "it is truncated or damaged: download it again"
        )
    if elements * bits != (end - begin) * 8:
        raise TensorError(
            f": shape {_short(shape)} of {dtype} needs {elements * bits / 8:.10g} bytes, "
            f"data_offsets hold {end - begin}"
        )
    return TensorEntry(name, dtype, tuple(shape), file, start + begin, end - begin)


def _short(value: Any) -> str:
    """An untrusted value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _check_cover(path: Path, tensors: list[TensorEntry], start: int, size: int) -> None:
    """The extents, in order of offset, must follow each other from ``start`` to the end of the file."""
    end, before = start, "the header"
    for entry in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if entry.offset < end:
            raise HeaderError(f"{path}: tensors {before} and {entry.name!r} overlap")
        if entry.offset > end:
            raise HeaderError(f"{path}: {entry.offset - end} bytes between {before} and {entry.name!r} have no tensor")
        end, before = entry.offset + entry.nbytes, repr(entry.name)
    if end != size:
        raise HeaderError(f"{path}: {size - end} bytes after the last tensor belong to none")


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write; its bytes come in pieces so that a large one is never whole in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Iterable[npt.NDArray[Any] | bytes]

    @property
    def nbytes(self) -> int:
        """Bytes its shape and dtype need."""
        elements = 1
        for n in self.shape:
            elements *= n
        return elements * DTYPE_BITS[self.dtype] // 8


def write_safetensors(
    path: Path, tensors: Sequence[NewTensor], metadata: dict[str, str] | None = None, align: int = 8
) -> None:
    """Write a file in bounded memory: to a temporary name, then fsync, then rename.

    Args:
        path: the file; replaced at once if it exists.
        tensors: written in this order.
        metadata: the ``__metadata__`` object.
        align: the data start is a multiple of this (the header is padded with spaces); 1 leaves it where it falls.

    Raises:
        ValueError: the chunks of a tensor do not add up to its size, or two tensors have one name.
        OSError: the disk is full or failed; the temporary file is removed.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for tensor in tensors:
        if tensor.name in header:
            raise ValueError(f"tensor {tensor.name!r} is given twice")
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    temporary = path.with_name(path.name + ".tmp")
    try:
        file = _StagedFile(temporary)
        try:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                written = sum(file.write(chunk) for chunk in tensor.chunks)
                if written != tensor.nbytes:
                    raise ValueError(f"tensor {tensor.name!r}: {written} bytes given, {tensor.nbytes} expected")
            file.finish()
        finally:
            os.close(file.descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


class _StagedFile:
    """Sequential writes through one aligned buffer, past the page cache where the system can.

    A file of many GB would otherwise evict everything else and wait for write-back (0.2-0.9 against 2 GB/s measured).
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._direct = getattr(os, "O_DIRECT", 0)  # absent on macOS
        try:
            self.descriptor = os.open(path, flags | self._direct, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = 0  # the file system refuses direct access
            self.descriptor = os.open(path, flags, 0o666)
        self._stage = np.frombuffer(mmap.mmap(-1, STAGE_BYTES), np.uint8)  # page aligned
        self._fill = 0

    def write(self, chunk: npt.NDArray[Any] | bytes) -> int:
        """Append all bytes of a chunk and return how many there were."""
        raw = np.frombuffer(chunk, np.uint8) if isinstance(chunk, bytes) else np.ascontiguousarray(chunk).reshape(-1)
        raw = raw.view(np.uint8)
        done = 0
        while done < raw.size:
            piece = raw[done : done + STAGE_BYTES - self._fill]
            self._stage[self._fill : self._fill + piece.size] = piece
            self._fill += piece.size
            done += piece.size
            if self._fill == STAGE_BYTES:
                self._flush()
        return raw.size

    def finish(self) -> None:
        """Write what is left, which is rarely a multiple of a block, and wait for the disk."""
        self._leave_direct_mode()
        self._flush()
        os.fsync(self.descriptor)

    def _flush(self) -> None:
        view = self._stage.data[: self._fill]
        while view:
            try:
                view = view[os.write(self.descriptor, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._leave_direct_mode()  # some file systems refuse only now
        self._fill = 0

    def _leave_direct_mode(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~self._direct)
            self._direct = 0


def fsync_directory(path: Path) -> None:
    """Make renames in a folder survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
