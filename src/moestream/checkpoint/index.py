"""A model folder: its config, its files and what they hold. Everything in it is untrusted."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.encoding import ExpertTable, MatrixSpec
from moestream.checkpoint.experts import expert_table
from moestream.checkpoint.layouts import FLOATS, Quantization, find_matrix, read_quantization
from moestream.checkpoint.quant import F32, U8, floats_from_bytes
from moestream.checkpoint.safetensors import (
    MAX_HEADER_BYTES,
    TensorEntry,
    parse_json,
    pread_exact,
    read_header,
    regular_file_size,
)
from moestream.errors import CheckpointError, ModelConfigError, ShardIndexError, TensorError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model folder. Opening reads headers only; every extent has been checked against its file."""

    path: Path
    config: dict[str, Any]
    """config.json as it is."""
    files: tuple[Path, ...]
    """Weight files, in order of name; ``TensorEntry.file`` and ``Extent.file`` index it."""
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    """``__metadata__`` of the first file."""
    quantization: Quantization
    """What config.json says about quantisation."""

    def matrix(self, path: str, rows: int, cols: int) -> MatrixSpec:
        """Find a matrix [rows, cols], quantised or plain.

        Args:
            path: module path without ``.weight``.
            rows: N, as the model's config implies.
            cols: K.

        Raises:
            TensorError: it is missing, or of a wrong dtype, shape or encoding.
        """
        found = find_matrix(self.tensors, self.quantization, path, (rows, cols))
        return MatrixSpec(path, found.layout, tuple(entry.extent for entry in found.tensors))

    def vector(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        """Find a small plain tensor by its full name.

        Raises:
            TensorError: it is missing, is not bf16, f16 or f32, or has another shape.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise TensorError(f"{self.path}: tensor {name!r} is missing")
        if entry.dtype not in FLOATS:
            raise TensorError(f"{self.path}: tensor {name!r} has dtype {entry.dtype}, expected BF16, F16 or F32")
        if entry.shape != shape:
            raise TensorError(f"{self.path}: tensor {name!r} has shape {list(entry.shape)}, expected {list(shape)}")
        return entry

    def experts(self, prefix: str, num_experts: int, hidden: int, intermediate: int) -> ExpertTable:
        """Find the experts of one layer; see ``experts.expert_table``.

        Args:
            prefix: the layer's MoE block, for example ``model.layers.3.mlp``.
            num_experts: E.
            hidden: H.
            intermediate: I.

        Raises:
            TensorError: they are missing, wrong, or differ in layout.
        """
        return expert_table(
            self.tensors,
            self.quantization,
            prefix,
            num_experts=num_experts,
            hidden=hidden,
            intermediate=intermediate,
        )

    def read_array(self, entry: TensorEntry) -> F32:
        """Read a plain tensor as float32 in its own shape.

        Raises:
            TensorError: its dtype is not bf16, f16 or f32.
            ReadError: the disk failed or the file became shorter.
        """
        if entry.dtype not in FLOATS:
            raise TensorError(f"{self.path}: tensor {entry.name!r} has dtype {entry.dtype}, expected BF16, F16 or F32")
        raw = self._read(entry.file, entry.offset, entry.nbytes)
        return floats_from_bytes(raw, FLOATS[entry.dtype]).reshape(entry.shape)

    def read_matrix(self, spec: MatrixSpec) -> tuple[U8, ...]:
        """Read the parts of a matrix, one 1-D array each.

        Raises:
            ReadError: the disk failed or the file became shorter.
        """
        return tuple(self._read(part.file, part.offset, part.nbytes) for part in spec.parts)

    def _read(self, file: int, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        return np.frombuffer(pread_exact(self.files[file], offset, nbytes), np.uint8)


@contextmanager
def paused_collector() -> Iterator[None]:
    """Hundreds of thousands of new objects, none of them garbage: the collector would look at them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@paused_collector()
def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face style folder: config.json with one ``model.safetensors`` or an index and its shards.

    Args:
        path: the folder. Links to files are followed, as download caches use them.

    Raises:
        ModelConfigError: config.json is missing, malformed, or names a quantisation we do not run.
        ShardIndexError: the index is malformed, names a file outside the folder, or disagrees with the shards.
        HeaderError: a safetensors header is malformed.
        TensorError: a tensor's dtype, shape or extent is wrong.
        CheckpointError: the folder or a file cannot be used.
        ReadError: the disk failed.
    """
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, False for any name the OS refuses
        raise CheckpointError(f"{path}: is not a folder")
    config = _read_json(path / "config.json", ModelConfigError, unique=False)
    quantization = read_quantization(config, f"{path / 'config.json'}")
    weight_map: dict[str, str] | None = None
    if (path / SINGLE_FILE).exists():
        names = [SINGLE_FILE]
    elif (path / INDEX_FILE).exists():
        weight_map = _read_weight_map(path / INDEX_FILE)
        names = sorted(set(weight_map.values()))
    else:
        raise CheckpointError(f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; other formats are not read")
    missing = [name for name in names if not os.path.exists(path / name)]
    if missing:
        raise ShardIndexError(
            f"{path}: {len(missing)} of {len(names)} shards are missing, first {missing[0]!r}: download them"
        )
    files = tuple(path / name for name in names)
    headers = [read_header(file, number) for number, file in enumerate(files)]
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        for name, entry in header.tensors.items():
            if name in tensors:
                raise ShardIndexError(
                    f"{path}: tensor {name!r} is in both {names[tensors[name].file]} and {names[entry.file]}"
                )
            tensors[name] = entry
    if weight_map is not None:
        _compare(path, weight_map, tensors, names)
    metadata = MappingProxyType(headers[0].metadata)
    return Checkpoint(path, config, files, MappingProxyType(tensors), metadata, quantization)


def _read_json(path: Path, error: type[CheckpointError], unique: bool) -> dict[str, Any]:
    """A JSON object from an untrusted file."""
    if not os.path.exists(path):
        raise error(f"{path}: is missing")
    size = regular_file_size(path)
    if size > MAX_HEADER_BYTES:
        raise error(f"{path}: {size} bytes exceed the limit of {MAX_HEADER_BYTES}")
    return parse_json(pread_exact(path, 0, size), str(path), error, unique)


def _read_weight_map(path: Path) -> dict[str, str]:
    """``weight_map`` of the index: tensor name to file name, every file directly in the folder."""
    weight_map = _read_json(path, ShardIndexError, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ShardIndexError(f"{path}: weight_map is missing, empty or not an object")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ShardIndexError(f"{path}: file of tensor {tensor!r} must be a string, is {name!r}")
    for name in set(weight_map.values()):
        outside = "/" in name or "\\" in name or ":" in name or name.startswith(".")
        if outside or not name.isprintable() or not name.endswith(".safetensors"):
            raise ShardIndexError(f"{path}: shard name {name!r} is not a plain *.safetensors file name in this folder")
    return weight_map


def _compare(path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry], names: list[str]) -> None:
    """The index and the shards must hold the same tensors in the same files."""
    for name, file in weight_map.items():
        entry = tensors.get(name)
        if entry is None:
            raise ShardIndexError(f"{path / file}: tensor {name!r} of {INDEX_FILE} is not in this shard")
        if names[entry.file] != file:
            raise ShardIndexError(
                f"{path}: {INDEX_FILE} puts tensor {name!r} in {file!r}, it is in {names[entry.file]!r}"
            )
    if len(tensors) != len(weight_map):
        extra = next(name for name in tensors if name not in weight_map)
        raise ShardIndexError(f"{path / names[tensors[extra].file]}: tensor {extra!r} is not in {INDEX_FILE}")
