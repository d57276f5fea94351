"""Where each expert of a layer lies, whichever of the three storage forms the checkpoint uses.

Shape letters: E experts, P parts of an expert, H hidden size, I expert width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.encoding import ExpertLayout, ExpertTable, MatrixLayout
from moestream.checkpoint.layouts import Quantization, StoredMatrix, find_matrix
from moestream.checkpoint.safetensors import TensorEntry
from moestream.errors import TensorError

Ranges = npt.NDArray[np.int64]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert_table(
    tensors: Mapping[str, TensorEntry],
    quantization: Quantization,
    prefix: str,
    *,
    num_experts: int,
    hidden: int,
    intermediate: int,
) -> ExpertTable:
    """Find the experts of one layer.

    Accepts, under ``prefix`` (for example ``model.layers.3.mlp``):

    * MLX stacks ``switch_mlp.{gate,up,down}_proj.*`` [E, ...],
    * Hugging Face fused ``experts.gate_up_proj`` [E, 2I, H] (rows gate, then up) and ``experts.down_proj`` [E, H, I],
    * one by one ``experts.{e}.{gate,up,down}_proj.*``.

    Raises:
        TensorError: no form is present, a tensor is missing or wrong, or experts of the layer differ in layout.
    """
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    if _has(tensors, f"{prefix}.switch_mlp.gate_proj"):
        stacks = [
            find_matrix(tensors, quantization, f"{prefix}.switch_mlp.{name}", (num_experts, *shape))
            for name, shape in zip(PROJECTIONS, shapes, strict=True)
        ]
        return _from_stacks(stacks, num_experts)
    if _has(tensors, f"{prefix}.experts.gate_up_proj"):
        fused = find_matrix(
            tensors, quantization, f"{prefix}.experts.gate_up_proj", (num_experts, 2 * intermediate, hidden)
        )
        down = find_matrix(tensors, quantization, f"{prefix}.experts.down_proj", (num_experts, hidden, intermediate))
        return _from_fused(fused, down, num_experts)
    if _has(tensors, f"{prefix}.experts.0.gate_proj"):
        if _has(tensors, f"{prefix}.experts.{num_experts}.gate_proj"):
            raise TensorError(f"{prefix}.experts holds more than the {num_experts} experts of config.json")
        return _from_singles(tensors, quantization, f"{prefix}.experts", num_experts, shapes)
    raise TensorError(
        f"no experts under {prefix!r}: looked for switch_mlp.gate_proj, experts.gate_up_proj and experts.0.gate_proj"
    )


def _has(tensors: Mapping[str, TensorEntry], path: str) -> bool:
    """Whether a module is there, with or without ``.weight``."""
    return f"{path}.weight" in tensors or path in tensors


def _strided(entry: TensorEntry, first: int, nbytes: int, num_experts: int) -> Ranges:
    """Range of ``nbytes`` at ``first`` within each of the E equal slices of a stack: [E, 3]."""
    ranges = np.empty((num_experts, 3), np.int64)
    ranges[:, 0] = entry.file
    ranges[:, 1] = entry.offset + first + np.arange(num_experts) * (entry.nbytes // num_experts)
    ranges[:, 2] = nbytes
    return ranges


def _from_stacks(stacks: Sequence[StoredMatrix], num_experts: int) -> ExpertTable:
    """Gate, up and down as [E, ...] each."""
    parts = [
        _strided(entry, 0, nbytes, num_experts)
        for stack in stacks
        for entry, nbytes in zip(stack.tensors, stack.layout.part_nbytes, strict=True)
    ]
    return ExpertTable(ExpertLayout(*(stack.layout for stack in stacks)), np.stack(parts, axis=1))


def _from_fused(fused: StoredMatrix, down: StoredMatrix, num_experts: int) -> ExpertTable:
    """Gate and up as the first and second half of the rows of one stack."""
    half = MatrixLayout(fused.layout.rows // 2, fused.layout.cols, fused.layout.encoding)
    parts = [
        _strided(entry, side * nbytes, nbytes, num_experts)
        for side in (0, 1)
        for entry, nbytes in zip(fused.tensors, half.part_nbytes, strict=True)
    ]
    parts += [
        _strided(entry, 0, nbytes, num_experts)
        for entry, nbytes in zip(down.tensors, down.layout.part_nbytes, strict=True)
    ]
    return ExpertTable(ExpertLayout(half, half, down.layout), np.stack(parts, axis=1))


def _from_singles(
    tensors: Mapping[str, TensorEntry],
    quantization: Quantization,
    prefix: str,
    num_experts: int,
    shapes: Sequence[tuple[int, int]],
) -> ExpertTable:
    """One module per expert and projection; all must look like expert 0."""
    layouts: list[MatrixLayout] = []
    parts: list[Ranges] = []
    for name, shape in zip(PROJECTIONS, shapes, strict=True):
        origin = f"{prefix}.0.{name}"
        first = find_matrix(tensors, quantization, origin, shape)
        paths = [(origin, f"{prefix}.{e}.{name}") for e in range(num_experts)]
        found = [_like(first, tensors, quantization, pair, shape) for pair in paths]
        layouts.append(first.layout)
        for p in range(len(first.tensors)):
            rows = [(entries[p].file, entries[p].offset, entries[p].nbytes) for entries in found]
            parts.append(np.array(rows, np.int64))
    return ExpertTable(ExpertLayout(*layouts), np.stack(parts, axis=1))


def _like(
    first: StoredMatrix,
    tensors: Mapping[str, TensorEntry],
    quantization: Quantization,
    paths: tuple[str, str],
    shape: tuple[int, int],
) -> tuple[TensorEntry, ...]:
    """The tensors of the second of two modules, which must be stored as the first one is.

    Where the tensors look the same so does the layout, which 92,000 modules of one checkpoint need not work out again.
    """
    origin, path = paths
    found = [tensors.get(path + entry.name[len(origin) :]) for entry in first.tensors]
    entries = tuple(entry for entry in found if entry is not None)
    same = len(entries) == len(found) and all(
        entry.dtype == model.dtype and entry.shape == model.shape
        for entry, model in zip(entries, first.tensors, strict=True)
    )
    same = same and (f"{path}.scales" in tensors) == (f"{origin}.scales" in tensors)
    if same and quantization.of(path) == quantization.of(origin):
        return entries
    matrix = find_matrix(tensors, quantization, path, shape)
    if matrix.layout != first.layout:
        raise TensorError(
            f"experts of a layer must share one encoding: {path} is {matrix.layout.encoding.name}, "
            f"{origin} is {first.layout.encoding.name}"
        )
    return matrix.tensors
