"""Encoded matrices to test with, and how far a product may be from the float64 one.

Bounds. A kernel sums K products in float32, each term passing through at most K + 16 roundings of 2^-24, so a product
is within (K + 16) 2^-24 sum |terms|, where the terms of an affine matrix are s q x and b x (they may cancel). In the
fast mode the activations of a group differ from the given ones by at most half a code unit, top / 127 / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestream.checkpoint.encoding import Encoding, ExpertLayout, MatrixLayout
from moestream.checkpoint.quant import encode, floats_from_bytes, unpack_codes
from moestream.ops.base import F32, U8, Wave

AFFINE = [
    Encoding("affine", bits, group, dtype)
    for bits in (2, 3, 4, 6, 8)
    for group, dtype in ((32, "bf16"), (64, "f16"), (128, "f32"))
]
MAIN = Encoding("affine", 4, 64, "bf16")
ENCODINGS = [*AFFINE, MAIN, Encoding("bf16"), Encoding("f16"), Encoding("f32")]
UNIT = 2.0**-24  # half the distance between float32 numbers near 1


def unaligned(part: U8, offset: int) -> U8:
    """A copy of ``part`` that starts ``offset`` bytes behind a 64-byte boundary."""
    room = np.zeros(part.size + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    out = room[start : start + part.size]
    out[:] = part
    return out


@dataclass
class Case:
    """A random matrix: its parts, and its exact values in float64."""

    layout: MatrixLayout
    parts: tuple[U8, ...]
    values: np.ndarray  # [N, K]
    sizes: np.ndarray  # [N, K]: |s q| + |b|, or |values|

    @classmethod
    def random(cls, rng: np.random.Generator, rows: int, cols: int, encoding: Encoding) -> Case:
        layout = MatrixLayout(rows, cols, encoding)
        weights = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
        parts = encode(weights, encoding)
        if encoding.kind != "affine":
            values = floats_from_bytes(parts[0], encoding.kind).astype(np.float64).reshape(rows, cols)
            return cls(layout, parts, values, np.abs(values))
        codes = unpack_codes(parts[0], encoding.bits).astype(np.float64).reshape(rows, -1, encoding.group)
        scales, biases = (
            floats_from_bytes(p, encoding.scale_dtype).astype(np.float64).reshape(rows, -1, 1) for p in parts[1:]
        )
        values = (codes * scales + biases).reshape(rows, cols)
        return cls(layout, parts, values, (codes * np.abs(scales) + np.abs(biases)).reshape(rows, cols))

    @property
    def rounds_input(self) -> bool:
        """Whether the fast mode rounds what this matrix is multiplied with."""
        return self.layout.encoding.kind == "affine"

    def product(self, x: np.ndarray, x_error: np.ndarray, exact: bool) -> tuple[np.ndarray, np.ndarray]:
        """float64 x W^T [T, N], and the bound of a kernel's error when x itself is off by ``x_error`` at most."""
        if not exact and self.rounds_input:
            x_error = x_error + code_units(np.abs(x) + x_error, self.layout.encoding.group) * (0.5 + 1e-4)
        rounding = (self.layout.cols + 16) * UNIT * (np.abs(x) + x_error) @ self.sizes.T
        return x @ self.values.T, x_error @ np.abs(self.values).T + rounding

    def expected_noise(self, x: np.ndarray) -> np.ndarray:
        """Standard deviation of the fast mode's error if rounding errors are uniform: [T, N]."""
        return np.sqrt(code_units(np.abs(x), self.layout.encoding.group) ** 2 / 12 @ (self.values**2).T)


def code_units(sizes: np.ndarray, group: int) -> np.ndarray:
    """The int8 step of every column, from magnitudes [T, K]."""
    grouped = sizes.reshape(len(sizes), sizes.shape[1] // group, group)
    return np.broadcast_to(grouped.max(axis=2, keepdims=True) / 127, grouped.shape).reshape(sizes.shape)


def swiglu_bound(x: F32, gate: Case, up: Case, down: Case, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """float64 down(silu(gate x) * up x), and the bound of a kernel's error."""
    x64 = x.astype(np.float64)
    g, g_error = gate.product(x64, np.zeros_like(x64), exact)
    u, u_error = up.product(x64, np.zeros_like(x64), exact)
    silu = g / (1 + np.exp(-g))
    silu_error = 1.1 * g_error + 16 * UNIT * np.abs(silu)  # |silu'| < 1.1; exp, add, divide
    hidden_error = silu_error * (np.abs(u) + u_error) + np.abs(silu) * u_error + 2 * UNIT * np.abs(silu * u)
    return down.product(silu * u, hidden_error, exact)


def check(got: F32, want: np.ndarray, bound: np.ndarray) -> None:
    """Fail with the worst position unless every value is within its bound."""
    error = np.abs(got - want)
    bad = ~(error <= bound)  # NaN is bad
    if bad.any():
        at = np.unravel_index(np.argmax(np.where(bad, np.nan_to_num(error / bound, nan=np.inf), -1)), error.shape)
        raise AssertionError(
            f"{bad.sum()} of {bad.size} values are out of bounds; worst at {tuple(map(int, at))}: "
            f"got {got[at]!r}, want {want[at]!r}, error {error[at]:.3g} > bound {bound[at]:.3g}"
        )


@dataclass
class Layer:
    """Random experts in one block of memory, each part at an odd place."""

    layout: ExpertLayout
    experts: list[tuple[Case, Case, Case]]
    memory: U8
    offsets: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, count: int, hidden: int, width: int, encoding: Encoding) -> Layer:
        experts = [
            (
                Case.random(rng, width, hidden, encoding),
                Case.random(rng, width, hidden, encoding),
                Case.random(rng, hidden, width, encoding),
            )
            for _ in range(count)
        ]
        pieces = [[p for case in expert for p in case.parts] for expert in experts]
        memory = np.zeros(sum(p.size + 64 for e in pieces for p in e), np.uint8)
        offsets = np.zeros((count, len(pieces[0])), np.int64)
        at = 0
        for i, expert in enumerate(pieces):
            for j, part in enumerate(expert):
                at += int(rng.integers(1, 64))
                offsets[i, j] = at
                memory[at : at + part.size] = part
                at += part.size
        layout = ExpertLayout(*(case.layout for case in experts[0]))
        return cls(layout, experts, memory[:at], offsets)

    def waves(self, ids: np.ndarray, groups: list[list[int]], layer: int = 0) -> list[Wave]:
        """One wave per group of experts, for the routed ids [T, k]."""
        flat = ids.reshape(-1)
        waves = []
        for group in groups:
            pairs = [np.flatnonzero(flat == e).astype(np.int32) for e in group]
            starts = np.cumsum([0, *map(len, pairs)]).astype(np.int32)
            joined = np.concatenate(pairs).astype(np.int32)
            experts = np.array(group, np.int32)
            waves.append(Wave(layer, self.layout, experts, self.memory, self.offsets[experts], starts, joined))
        return waves
