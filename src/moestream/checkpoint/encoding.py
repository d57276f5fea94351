"""How a matrix is stored, in memory and on disk. The codecs themselves are in ``quant.py``.

Shape letters: N rows (out features), K columns (in features), E experts, P parts of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatDtype = Literal["bf16", "f16", "f32"]
Kind = Literal["affine", "bf16", "f16", "f32"]

FLOAT_BYTES: dict[str, int] = {"bf16": 2, "f16": 2, "f32": 4}
AFFINE_BITS = (2, 3, 4, 6, 8)
AFFINE_GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Encoding:
    """``affine``: value = scale * code + bias per group of ``group`` columns; otherwise plain floats."""

    kind: Kind
    bits: int = 0
    group: int = 0
    scale_dtype: FloatDtype = "bf16"

    @property
    def name(self) -> str:
        """Short name for people: ``affine-4 g64`` or ``bf16``."""
        return f"affine-{self.bits} g{self.group}" if self.kind == "affine" else self.kind


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """Shape and encoding of one matrix ``[rows, cols]``; lin(x) = x W^T."""

    rows: int
    cols: int
    encoding: Encoding

    @property
    def part_nbytes(self) -> tuple[int, ...]:
        """Bytes of each part: affine has (codes, scales, biases), floats have (values,)."""
        e = self.encoding
        if e.kind == "affine":
            scales = self.rows * (self.cols // e.group) * FLOAT_BYTES[e.scale_dtype]
            return (self.rows * self.cols * e.bits // 8, scales, scales)
        return (self.rows * self.cols * FLOAT_BYTES[e.kind],)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(self.part_nbytes)


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of one file of a checkpoint."""

    file: int
    """Index into ``Checkpoint.files``."""
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class MatrixSpec:
    """One matrix and where its parts lie on disk; ``parts`` matches ``layout.part_nbytes``."""

    name: str
    layout: MatrixLayout
    parts: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """What every expert of one layer looks like. Parts are ordered gate, up, down, each as in ``part_nbytes``."""

    gate: MatrixLayout  # [I, H]
    up: MatrixLayout  # [I, H]
    down: MatrixLayout  # [H, I]

    @property
    def matrices(self) -> tuple[MatrixLayout, MatrixLayout, MatrixLayout]:
        """The three matrices in part order."""
        return (self.gate, self.up, self.down)

    @property
    def part_nbytes(self) -> tuple[int, ...]:
        """Bytes of each of the P parts."""
        return sum((m.part_nbytes for m in self.matrices), ())

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return sum(self.part_nbytes)


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """Where every expert of one layer lies on disk."""

    layout: ExpertLayout
    ranges: npt.NDArray[np.int64]  # [E, P, 3]: file, offset, nbytes

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.ranges.shape[0])
