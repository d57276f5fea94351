"""The native backend: kernels for AVX-512, AVX2, NEON and plain C++, chosen at run time.

What multiplies by an encoded matrix is here; norms, routing, attention and delta-net are in ``cpu_sequence.py``.
In the fast mode activations that meet ``affine`` matrices are rounded to int8 per group of columns, once per input;
``exact`` keeps them float32. Matrices of plain floats always multiply in float32.

Shape letters: as in ``base.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from moestream.checkpoint.encoding import ExpertLayout, MatrixLayout
from moestream.errors import BackendError, ConfigError
from moestream.ops.base import F32, I32, U8, Wave
from moestream.system import cpu_count

try:
    from moestream import _native
    from moestream.ops.cpu_sequence import SequenceOps
    from moestream.ops.cpu_steps import NativeSteps
except ImportError as error:
    raise BackendError(
        f"the native kernels are missing ({error}): install a C++20 compiler and CMake, then reinstall moestream "
        "with `pip install --force-reinstall --no-binary moestream moestream`; or use backend='reference' (slow)"
    ) from error

_SMALL_INPUT = 16  # rows up to which rounding an input again costs less than a mistake would


class CpuOps(SequenceOps, NativeSteps):
    """``Ops`` on the CPU. Float32 C-contiguous arrays in and out; a wrong shape raises ``ValueError``.

    Thread rule: one call at a time. The compute threads belong to the process, so the last instance made sets their
    number.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None, exact: bool = False) -> None:
        """Set the number of compute threads (None: all this process may use) and the mode.

        Raises:
            ConfigError: ``MOESTREAM_ISA`` is none of the instruction sets.
        """
        try:
            _native.active_isa()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.exact = exact
        self.threads = threads if threads is not None else cpu_count()
        _native.set_threads(self.threads)
        self._input = _native.Input()
        self._bound: tuple[weakref.ref[F32], int] | None = None
        self._experts: dict[int, tuple[ExpertLayout, _native.Experts]] = {}  # by layer

    def matrix(self, layout: MatrixLayout, parts: Sequence[U8]) -> _native.Matrix:
        """Wrap raw parts (1-D bytes, any alignment), which the result keeps alive.

        Raises:
            ValueError: the encoding is not supported, or a part is shorter than the layout says.
        """
        return _native.Matrix(_native_layout(layout), list(parts))

    def embed(self, ids: I32, table: _native.Matrix) -> F32:
        """Rows of an encoded table: [T] -> [T, H]."""
        out = np.empty((len(ids), table.cols), np.float32)
        _native.embed(ids, table, out)
        return out

    def linear(self, x: F32, matrices: Sequence[_native.Matrix]) -> list[F32]:
        """Compute x W^T for matrices sharing one input: [T, K] -> [[T, N], ...]."""
        outs = [np.empty((len(x), m.rows), np.float32) for m in matrices]
        self._bind(x)
        _native.linear(self._input, list(matrices), outs)
        return outs

    def normed_linear(self, x: F32, norm: F32, eps: float, matrices: Sequence[_native.Matrix]) -> tuple[F32, list[F32]]:
        """RMSNorm of x [T, K] and its products: h [T, K], [h W^T [T, N], ...]."""
        h = np.empty_like(x)
        outs = [np.empty((len(x), m.rows), np.float32) for m in matrices]
        self._bound = None
        _native.normed_linear(self._input, x, norm, eps, self.exact, h, matrices, outs)
        return h, outs

    def linear_onto(self, x: F32, rows: F32, matrix: _native.Matrix) -> F32:
        """Compute x + rows W^T: x [T, N], rows [T, K] -> [T, N]."""
        out = np.empty_like(x)
        self._bind(rows)
        _native.linear_onto(self._input, matrix, x, out)
        return out

    def swiglu(self, x: F32, gate: _native.Matrix, up: _native.Matrix, down: _native.Matrix) -> F32:
        """down(silu(gate x) * up x): [T, H] -> [T, H]."""
        out = np.empty((len(x), down.rows), np.float32)
        self._bind(x)
        _native.swiglu(self._input, gate, up, down, out)
        return out

    def experts(self, x: F32, wave: Wave, k: int, out: F32) -> None:
        """Write each pair's expert output to ``out[pair]``; out [T * k, H].

        While the waves of one layer come in, ``x`` is rounded once; it must not change between them.
        """
        known = self._experts.get(wave.layer)
        if known is None or known[0] is not wave.layout:
            known = (wave.layout, _native.Experts(*(_native_layout(m) for m in wave.layout.matrices)))
            self._experts[wave.layer] = known
        self._bind(x, wave.layer)
        known[1].run(self._input, wave.memory, wave.offsets, wave.rows, wave.starts, wave.pairs, k, out)

    def _bind(self, x: F32, layer: int = -1) -> None:
        """Make ``x`` the input, rounding it again unless it is the array of this layer's last wave."""
        if layer >= 0 and len(x) > _SMALL_INPUT:
            if self._bound is not None and self._bound[0]() is x and self._bound[1] == layer:
                return
            self._bound = (weakref.ref(x), layer)
        else:
            self._bound = None
        self._input.bind(x, self.exact)


def _native_layout(layout: MatrixLayout) -> _native.MatrixLayout:
    e = layout.encoding
    return _native.MatrixLayout(layout.rows, layout.cols, e.kind, e.bits, e.group, e.scale_dtype)
