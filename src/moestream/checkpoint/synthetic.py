"""Random-weight checkpoints of true geometry, written directly quantised at disk speed.

The files are those of an MLX conversion: the same names, shapes, dtypes, shard size and unpadded headers, so reads hit
the same odd offsets. Bytes come from a pool of random data that every tensor enters at its own offset. Weights have
standard deviation 1 / sqrt(columns), which keeps activations near 1 through any number of layers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.encoding import Encoding
from moestream.checkpoint.geometry import ROUTER_BITS, ROUTER_GROUP, Config, Planned, geometry, plan_tensors
from moestream.checkpoint.index import INDEX_FILE, SINGLE_FILE
from moestream.checkpoint.quant import F32, U8, check_encoding, floats_to_bytes
from moestream.checkpoint.safetensors import NewTensor, fsync_directory, write_safetensors
from moestream.errors import CheckpointError, ConfigError

AnyArray = npt.NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""

AFFINE_4 = Encoding("affine", 4, 64)
MAX_SHARD_BYTES = 5 << 30  # what MLX uses
POOL_BYTES = 32 << 20
SCALE_POOL = 1 << 20  # scales in one pool
FREE_RESERVE = 1 << 30
"""Disk space left over for others."""
STORED_FLOAT = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


def write_synthetic(
    path: Path,
    name: str,
    layers: int | None = None,
    encoding: Encoding = AFFINE_4,
    progress: Progress | None = None,
    *,
    seed: int = 0,
    max_shard: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint of a published shape with random weights; it has no tokenizer.

    Args:
        path: the folder to make; it appears complete or not at all.
        name: a key of ``geometry.GEOMETRIES``.
        layers: number of layers instead of the published one.
        encoding: affine encoding of all matrices (routers of qwen3_5_moe are always 8 bits).
        progress: called after every piece written.
        seed: the same seed gives the same bytes.
        max_shard: bytes of tensors after which a new shard begins.

    Raises:
        ConfigError: unknown name, layers below 1, or an encoding that does not fit the shape.
        CheckpointError: the folder exists already, or the disk has too little room.
    """
    path = Path(path)
    config = geometry(name, layers)
    modules = list(plan_tensors(config))
    _check_fits(name, modules, encoding)
    if path.exists():
        raise CheckpointError(f"{path}: exists already; remove it or choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(modules, encoding, seed)
    total = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(path.parent).free
    if free < total + FREE_RESERVE:
        raise CheckpointError(
            f"{path}: {name} needs {total / 1e9:.1f} GB and {FREE_RESERVE / 1e9:.1f} GB to spare, "
            f"the disk has {free / 1e9:.1f} GB free; choose fewer layers"
        )
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_files(temporary, _counted(tensors, total, progress) if progress else tensors, max_shard)
        _write_json(temporary / "config.json", config | _quantization(modules, encoding))
        fsync_directory(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def synthetic_nbytes(name: str, layers: int | None = None, encoding: Encoding = AFFINE_4) -> int:
    """Bytes of tensors ``write_synthetic`` would write.

    Raises:
        ConfigError: as for ``write_synthetic``.
    """
    modules = list(plan_tensors(geometry(name, layers)))
    _check_fits(name, modules, encoding)
    return sum(tensor.nbytes for tensor in _tensors(modules, encoding, seed=0))


def _tensors(modules: Sequence[Planned], encoding: Encoding, seed: int) -> list[NewTensor]:
    """All tensors of a plan; nothing large is made yet."""
    weights = _RandomWeights(encoding, seed)
    return [tensor for number, module in enumerate(modules) for tensor in weights.tensors(number, module)]


def _counted(tensors: Sequence[NewTensor], total: int, progress: Progress) -> list[NewTensor]:
    """The same tensors, reporting each piece as it is written."""
    done = 0

    def count(chunks: Iterable[AnyArray | bytes]) -> Iterator[AnyArray | bytes]:
        nonlocal done
        for chunk in chunks:
            yield chunk
            done += len(chunk) if isinstance(chunk, bytes) else chunk.nbytes
            progress(done, total)

    return [replace(tensor, chunks=count(tensor.chunks)) for tensor in tensors]


def _check_fits(name: str, modules: Sequence[Planned], encoding: Encoding) -> None:
    """The encoding must be affine and divide the columns of every matrix."""
    if encoding.kind != "affine":
        raise ConfigError(f"synthetic weights are affine, not {encoding.kind}")
    try:
        for module in modules:
            if module.fill == "matrix":
                check_encoding(encoding, module.shape[-1])
    except ValueError as error:
        raise ConfigError(f"{name} cannot be stored as {encoding.name}: {error}") from error


def _quantization(modules: Sequence[Planned], encoding: Encoding) -> Config:
    """MLX's settings, under both of its names, with the routers as overrides."""
    settings: Config = {"group_size": encoding.group, "bits": encoding.bits, "mode": "affine"}
    for module in modules:
        if module.fill == "router":
            settings[module.path] = {"group_size": ROUTER_GROUP, "bits": ROUTER_BITS}
    return {"quantization": settings, "quantization_config": settings}


def _write_json(path: Path, value: Config) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _write_files(folder: Path, tensors: Sequence[NewTensor], max_shard: int) -> None:
    """Deal the tensors to shards in order; no tensor is split."""
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    count = len(shards)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        # align=1: MLX does not pad headers, so data starts at any byte.
        write_safetensors(folder / name, shard, {"format": "mlx"}, align=1)
    if count > 1:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(tensor.nbytes for tensor in tensors)
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


class _RandomWeights:
    """Tensors of planned modules. Their bytes are windows of a few pools, cut when they are written."""

    def __init__(self, encoding: Encoding, seed: int) -> None:
        self.encoding = encoding
        self.seed = seed
        self._scales: dict[tuple[int, Encoding], tuple[U8, U8]] = {}

    @cached_property
    def _codes(self) -> U8:
        """Uniform codes of any width."""
        return np.frombuffer(np.random.default_rng(self.seed).bytes(POOL_BYTES), np.uint8)

    def tensors(self, number: int, module: Planned) -> list[NewTensor]:
        """The tensors of module ``number`` of a plan."""
        if module.fill not in ("matrix", "router"):
            dtype = "f32" if module.fill == "log_decay" else "bf16"
            raw = floats_to_bytes(self._vector(number, module), dtype)
            return [NewTensor(module.path, STORED_FLOAT[dtype], module.shape, [raw])]
        e = self.encoding
        if module.fill == "router":
            e = replace(e, bits=ROUTER_BITS, group=ROUTER_GROUP)
        lead, cols = module.shape[:-1], module.shape[-1]
        dtype, groups = STORED_FLOAT[e.scale_dtype], (*lead, cols // e.group)
        tensors = [
            NewTensor(f"{module.path}.weight", "U32", (*lead, cols * e.bits // 32), ()),
            NewTensor(f"{module.path}.scales", dtype, groups, ()),
            NewTensor(f"{module.path}.biases", dtype, groups, ()),
        ]
        return [
            replace(tensor, chunks=self._windows(number, part, tensor.nbytes, cols, e))
            for part, tensor in enumerate(tensors)
        ]

    def _windows(self, number: int, part: int, nbytes: int, cols: int, encoding: Encoding) -> Iterator[U8]:
        """Pieces of a part's pool at random places; scales and biases take the same ones, as they belong together."""
        pool = self._codes if part == 0 else self._scale_pools(cols, encoding)[part - 1]
        random = np.random.default_rng([self.seed, number, min(part, 1)])
        longest = pool.size // 2
        for done in range(0, nbytes, longest):
            start = int(random.integers(longest // 4)) * 4
            yield pool[start : start + min(longest, nbytes - done)]

    def _scale_pools(self, cols: int, e: Encoding) -> tuple[U8, U8]:
        """Scales of both signs and the biases that centre the codes, for weights of deviation 1 / sqrt(cols)."""
        if (cols, e) not in self._scales:
            random = np.random.default_rng([self.seed, cols])
            deviation = ((4**e.bits - 1) / 12) ** 0.5  # of uniform codes
            scales = random.uniform(0.75, 1.25, SCALE_POOL) * random.choice([-1, 1], SCALE_POOL)
            scales = (scales / (deviation * cols**0.5)).astype(np.float32)
            biases = scales * np.float32(-(2**e.bits - 1) / 2)
            self._scales[cols, e] = (floats_to_bytes(scales, e.scale_dtype), floats_to_bytes(biases, e.scale_dtype))
        return self._scales[cols, e]

    def _vector(self, number: int, module: Planned) -> F32:
        """Norms and offsets are 1; decay rates spread over 1..16, as trained models start out."""
        random = np.random.default_rng([self.seed, number])
        if module.fill == "ones":
            return np.ones(module.shape, np.float32)
        if module.fill == "conv":
            return random.standard_normal(module.shape, np.float32) * np.float32(0.5)
        return np.log(random.uniform(1, 16, module.shape)).astype(np.float32)
