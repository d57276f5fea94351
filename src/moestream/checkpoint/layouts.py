"""From the tensors of a checkpoint to matrices: which encoding a module is stored in, checked against config.json.

A module ``path`` is affine exactly when ``path.scales`` exists; bits and group follow from the shapes, since rows and
columns are known from the model's config, and must agree with ``config["quantization"]`` where that speaks about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moestream.checkpoint.encoding import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    Encoding,
    FloatDtype,
    MatrixLayout,
)
from moestream.checkpoint.safetensors import TensorEntry
from moestream.errors import ModelConfigError, TensorError

SUPPORTED = "supported are plain bf16, f16 and f32 tensors and MLX affine (bits 2, 3, 4, 6, 8; group 32, 64, 128)"

FLOATS: dict[str, FloatDtype] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


@dataclass(frozen=True, slots=True)
class Quantization:
    """What config.json says about quantisation, in MLX's terms."""

    default: Mapping[str, Any] | None
    overrides: Mapping[str, Mapping[str, Any] | bool]

    def of(self, path: str) -> Mapping[str, Any] | bool | None:
        """What applies to a module path: its settings, whether it is quantised at all, or None when nothing is said."""
        return self.overrides.get(path, self.default)


def read_quantization(config: Mapping[str, Any], where: str) -> Quantization:
    """Read ``quantization`` (or MLX's copy of it, ``quantization_config``) of a config.

    Raises:
        ModelConfigError: a method other than MLX's is named, or a field has the wrong type.
    """
    found = config.get("quantization")
    if found is None:  # MLX writes its settings under both names, everyone else under the second, perhaps nested
        nested = config.get("text_config")
        found = config.get("quantization_config")
        if found is None and isinstance(nested, dict):
            found = nested.get("quantization_config")
        if isinstance(found, dict) and "quant_method" in found:
            algorithm = f" ({found['quant_algo']})" if isinstance(found.get("quant_algo"), str) else ""
            raise ModelConfigError(
                f"{where}: quantization_config.quant_method {found['quant_method']!r}{algorithm} is not supported; "
                f"{SUPPORTED}"
            )
    if found is None:
        return Quantization(None, {})
    if not isinstance(found, dict):
        raise ModelConfigError(f"{where}: quantization must be an object, is {type(found).__name__}")
    default = {key: value for key, value in found.items() if key in ("bits", "group_size", "mode")}
    overrides = {key: value for key, value in found.items() if isinstance(value, dict | bool)}
    for name, entry in (("quantization", default), *overrides.items()):
        if isinstance(entry, dict):
            _check_settings(f"{where}: {name}", entry)
    return Quantization(default, overrides)


def _check_settings(where: str, entry: Mapping[str, Any]) -> None:
    """Types of one settings object; both numbers are needed."""
    for key in ("bits", "group_size"):
        if type(entry.get(key)) is not int:
            raise ModelConfigError(f"{where}: {key} must be an integer, is {entry.get(key)!r}")
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str):
        raise ModelConfigError(f"{where}: mode must be a string, is {mode!r}")


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Tensors that hold one matrix, or a stack of equal ones along leading axes."""

    layout: MatrixLayout
    tensors: tuple[TensorEntry, ...]  # one per part of the layout


def find_matrix(
    tensors: Mapping[str, TensorEntry], quantization: Quantization, path: str, shape: tuple[int, ...]
) -> StoredMatrix:
    """Find the tensors of a module and check them.

    Args:
        tensors: all tensors of the checkpoint.
        quantization: what config.json says.
        path: module path without ``.weight``.
        shape: expected ``[..., rows, cols]``; leading axes for stacks.

    Raises:
        TensorError: missing, or of a wrong dtype, shape or encoding; the message names the tensor and both shapes.
    """
    if f"{path}.scales" in tensors:
        return _find_affine(tensors, quantization, path, shape)
    entry = tensors.get(f"{path}.weight") or tensors.get(path)
    if entry is None:
        raise TensorError(f"tensor {path + '.weight'!r} is missing")
    if entry.dtype not in FLOATS:
        raise TensorError(f"tensor {entry.name!r} has dtype {entry.dtype} and no {path}.scales; {SUPPORTED}")
    if entry.shape != shape:
        raise TensorError(f"tensor {entry.name!r} has shape {list(entry.shape)}, expected {list(shape)}")
    return StoredMatrix(MatrixLayout(shape[-2], shape[-1], Encoding(FLOATS[entry.dtype])), (entry,))


def _find_affine(
    tensors: Mapping[str, TensorEntry], quantization: Quantization, path: str, shape: tuple[int, ...]
) -> StoredMatrix:
    """Weight, scales and biases of an MLX affine module."""
    configured = quantization.of(path)
    mode = configured.get("mode", "affine") if isinstance(configured, Mapping) else "affine"
    if mode != "affine":
        raise TensorError(f"{path!r} is quantised in mode {mode!r}; {SUPPORTED}")
    try:
        weight, scales, biases = (tensors[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
    except KeyError as missing:
        raise TensorError(f"tensor {missing} is missing, but {path + '.scales'!r} exists") from None
    if weight.dtype != "U32":
        raise TensorError(f"tensor {weight.name!r} has dtype {weight.dtype}, affine codes are U32")
    for entry in (scales, biases):
        if entry.dtype not in FLOATS:
            raise TensorError(f"tensor {entry.name!r} has dtype {entry.dtype}, affine scales are BF16, F16 or F32")
    if scales.dtype != biases.dtype:
        raise TensorError(f"{scales.name!r} is {scales.dtype} but {biases.name!r} is {biases.dtype}: they must agree")
    bits = _bits(weight, shape)
    group = _group(scales, shape)
    if biases.shape != scales.shape:
        raise TensorError(f"tensor {biases.name!r} has shape {list(biases.shape)}, expected {list(scales.shape)}")
    _cross_check(configured, path, bits, group)
    encoding = Encoding("affine", bits, group, FLOATS[scales.dtype])
    return StoredMatrix(MatrixLayout(shape[-2], shape[-1], encoding), (weight, scales, biases))


def _bits(weight: TensorEntry, shape: tuple[int, ...]) -> int:
    """Bits per code, from the packed width."""
    packed = weight.shape[-1] * 32 if weight.shape else 0
    bits, rest = divmod(packed, shape[-1])
    if weight.shape[:-1] != shape[:-1] or rest or bits not in AFFINE_BITS:
        raise TensorError(
            f"tensor {weight.name!r} has shape {list(weight.shape)}, which does not hold {list(shape)} "
            f"at any of {AFFINE_BITS} bits"
        )
    return bits


def _group(scales: TensorEntry, shape: tuple[int, ...]) -> int:
    """Columns per scale."""
    groups = scales.shape[-1] if scales.shape else 0
    group, rest = divmod(shape[-1], groups) if groups else (0, 0)
    if scales.shape[:-1] != shape[:-1] or rest or group not in AFFINE_GROUPS:
        raise TensorError(
            f"tensor {scales.name!r} has shape {list(scales.shape)}, which does not hold the scales of {list(shape)} "
            f"in groups of any of {AFFINE_GROUPS}"
        )
    return group


def _cross_check(configured: Mapping[str, Any] | bool | None, path: str, bits: int, group: int) -> None:
    """Shapes and config.json must tell the same story."""
    if configured is False:
        raise TensorError(f"config.json says {path!r} is not quantised, but {path + '.scales'!r} exists")
    if not isinstance(configured, Mapping):
        return
    for name, stored in (("bits", bits), ("group_size", group)):
        if configured[name] != stored:
            raise TensorError(
                f"{path!r} is stored with {name} {stored}, but config.json's quantization says {configured[name]}"
            )
