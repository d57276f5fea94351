"""Products with encoded matrices: every encoding, tier and mode against float64, at awkward shapes and addresses."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
from matrix_cases import ENCODINGS, MAIN, Case, check, swiglu_bound, unaligned

from moestream.checkpoint.encoding import Encoding, MatrixLayout
from moestream.checkpoint.quant import decode

native = pytest.importorskip("moestream._native", reason="the native kernels are not built")
from moestream.ops.cpu import CpuOps  # noqa: E402

ROWS_OF_INPUT = (1, 2, 3, 4, 5, 33)


@pytest.fixture(params=[True, False], ids=["exact", "fast"])
def exact(request: pytest.FixtureRequest) -> bool:
    return request.param


def shapes(encoding: Encoding) -> list[tuple[int, int]]:
    """One block of columns and several, whole and partial; rows around every tile size."""
    if encoding.kind != "affine":
        return [(1, 7), (3, 130), (17, 64), (70, 1157)]
    g = encoding.group
    return [(1, g), (3, 3 * g), (17, 5 * g), (70, 1024 + 3 * g)]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: f"{e.name} {e.scale_dtype}")
def test_linear_is_within_its_bound(tier: str, exact: bool, encoding: Encoding) -> None:
    rng = np.random.default_rng(1)
    ops = CpuOps(2, exact)
    for i, (rows, cols) in enumerate(shapes(encoding)):
        case = Case.random(rng, rows, cols, encoding)
        matrix = ops.matrix(case.layout, [unaligned(p, 1 + (21 * i + 10 * j) % 63) for j, p in enumerate(case.parts)])
        for count in ROWS_OF_INPUT:
            x = rng.standard_normal((count, cols)).astype(np.float32)
            (got,) = ops.linear(x, [matrix])
            want, bound = case.product(x.astype(np.float64), np.zeros(x.shape), exact)
            check(got, want, bound)
            if want.size < 100:
                continue
            # the worst case says little about the usual one: errors are noise far below the values, in the fast mode of
            # the size that rounding makes
            signal = np.sqrt(np.mean(want**2))
            noise = np.sqrt(np.mean((got - want) ** 2))
            if exact or not case.rounds_input:
                assert np.median(bound) < 0.02 * signal
                assert noise < 3e-6 * signal
            else:
                expected = np.sqrt(np.mean(case.expected_noise(x) ** 2))
                assert noise < 1.5 * expected
                assert noise < 0.02 * signal


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: f"{e.name} {e.scale_dtype}")
def test_embed_decodes_bit_for_bit(tier: str, encoding: Encoding) -> None:
    rng = np.random.default_rng(2)
    ops = CpuOps(1)
    for rows, cols in shapes(encoding):
        case = Case.random(rng, rows, cols, encoding)
        ids = rng.integers(0, rows, 40).astype(np.int32)
        got = ops.embed(ids, ops.matrix(case.layout, [unaligned(p, 3) for p in case.parts]))
        np.testing.assert_array_equal(got, decode(case.layout, case.parts)[ids])


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: f"{e.name} {e.scale_dtype}")
def test_swiglu_is_within_its_bound(tier: str, exact: bool, encoding: Encoding) -> None:
    rng = np.random.default_rng(3)
    ops = CpuOps(2, exact)
    hidden, width = 256, 384
    gate, up = (Case.random(rng, width, hidden, encoding) for _ in range(2))
    down = Case.random(rng, hidden, width, encoding)
    matrices = [ops.matrix(c.layout, c.parts) for c in (gate, up, down)]
    for count in (1, 3, 5, 33):
        x = (2 * rng.standard_normal((count, hidden))).astype(np.float32)
        want, bound = swiglu_bound(x, gate, up, down, exact)
        got = ops.swiglu(x, *matrices)
        check(got, want, bound)
        limit = 2e-5 if exact or not gate.rounds_input else 0.04
        assert np.sqrt(np.mean((got - want) ** 2)) < limit * np.sqrt(np.mean(want**2))


def test_swiglu_keeps_its_precision_for_large_gates(tier: str) -> None:
    ops = CpuOps(1, exact=True)
    one = ops.matrix(MatrixLayout(1, 1, Encoding("f32")), [np.ones(1, np.float32).view(np.uint8)])
    x = np.array([[-200.0], [-88.5], [-20], [-1e-3], [0], [1e-8], [0.7], [30], [88.5], [1e4]], np.float32)
    x64 = x.astype(np.float64)
    want = x64 / (1 + np.exp(-x64)) * x64
    np.testing.assert_allclose(ops.swiglu(x, one, one, one), want, rtol=1e-6, atol=1e-30)


def test_matrices_of_one_input_may_differ(tier: str, exact: bool) -> None:
    rng = np.random.default_rng(4)
    ops = CpuOps(2, exact)
    cases = [Case.random(rng, rows, 256, e) for rows, e in zip(range(1, 50, 2), ENCODINGS, strict=False)]
    matrices = [ops.matrix(c.layout, c.parts) for c in cases]
    for count in (1, 9):
        x = rng.standard_normal((count, 256)).astype(np.float32)
        together = ops.linear(x, matrices)
        for matrix, got in zip(matrices, together, strict=True):
            np.testing.assert_array_equal(got, ops.linear(x, [matrix])[0])


@pytest.mark.parametrize("count", [1, 3, 40])
def test_fused_products_equal_their_parts(tier: str, exact: bool, count: int) -> None:
    rng = np.random.default_rng(6)
    ops = CpuOps(2, exact)
    cases = [Case.random(rng, rows, 192, e) for rows, e in ((7, MAIN), (33, Encoding("bf16")), (192, MAIN))]
    matrices = [ops.matrix(c.layout, c.parts) for c in cases]
    x = rng.standard_normal((count, 192)).astype(np.float32)
    norm = rng.standard_normal(192).astype(np.float32)
    h, outs = ops.normed_linear(x, norm, 1e-6, matrices)
    np.testing.assert_array_equal(h, ops.rms_norm(x, norm, 1e-6))
    for got, want in zip(outs, ops.linear(h, matrices), strict=True):
        np.testing.assert_array_equal(got, want)
    rows = rng.standard_normal((count, 192)).astype(np.float32)
    np.testing.assert_array_equal(ops.linear_onto(x, rows, matrices[2]), x + ops.linear(rows, [matrices[2]])[0])


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: f"{e.name} {e.scale_dtype}")
def test_nothing_is_read_past_a_part(tier: str, exact: bool, encoding: Encoding) -> None:
    """Each part ends where unreadable memory begins; reading on would end the process."""
    rng = np.random.default_rng(5)
    ops = CpuOps(1, exact)
    rows, cols = 19, 96 if encoding.group in (0, 32) else 3 * encoding.group
    case = Case.random(rng, rows, cols, encoding)
    fenced = [Fenced(p) for p in case.parts]
    matrix = ops.matrix(case.layout, [f.part for f in fenced])
    for count in (1, 2, 6):
        x = rng.standard_normal((count, cols)).astype(np.float32)
        want, bound = case.product(x.astype(np.float64), np.zeros(x.shape), exact)
        check(ops.linear(x, [matrix])[0], want, bound)
    ids = np.arange(rows, dtype=np.int32)
    np.testing.assert_array_equal(ops.embed(ids, matrix), decode(case.layout, case.parts))


class Fenced:
    """A copy of a part directly before a page that cannot be read."""

    def __init__(self, part: np.ndarray) -> None:
        page = mmap.PAGESIZE
        size = -(-part.size // page) * page
        self.map = mmap.mmap(-1, size + page)
        whole = np.frombuffer(self.map, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        fence = ctypes.c_void_p(whole.ctypes.data + size)
        assert libc.mprotect(fence, ctypes.c_size_t(page), 0) == 0
        self.part = whole[size - part.size : size]
        self.part[:] = part


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_shows_in_its_row_only(tier: str, exact: bool, value: float) -> None:
    rng = np.random.default_rng(6)
    ops = CpuOps(1, exact)
    case = Case.random(rng, 40, 256, MAIN)
    matrix = ops.matrix(case.layout, case.parts)
    for count in (1, 2, 7):
        x = rng.standard_normal((count, 256)).astype(np.float32)
        x[count - 1, 77] = value
        (got,) = ops.linear(x, [matrix])
        assert not np.isfinite(got[count - 1]).any()
        assert np.isfinite(got[: count - 1]).all()


def test_zeros_give_zeros(tier: str, exact: bool) -> None:
    ops = CpuOps(1, exact)
    case = Case.random(np.random.default_rng(7), 40, 256, MAIN)
    for count in (1, 7):
        got = ops.linear(np.zeros((count, 256), np.float32), [ops.matrix(case.layout, case.parts)])[0]
        np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("encoding", [MAIN, Encoding("bf16")], ids=lambda e: e.name)
def test_no_rows_give_no_rows(tier: str, exact: bool, encoding: Encoding) -> None:
    ops = CpuOps(1, exact)
    case = Case.random(np.random.default_rng(9), 64, 64, encoding)
    matrix = ops.matrix(case.layout, case.parts)
    x = np.empty((0, 64), np.float32)
    norm = np.ones(64, np.float32)
    assert ops.linear(x, [matrix])[0].shape == (0, 64)
    assert ops.normed_linear(x, norm, 1e-6, [matrix])[1][0].shape == (0, 64)
    assert ops.linear_onto(x, x, matrix).shape == (0, 64)
    assert ops.swiglu(x, matrix, matrix, matrix).shape == (0, 64)
    assert ops.route_step(norm, 1e-6, matrix, None, True)(x, 4)[1].shape == (0, 4)


def test_wrong_shapes_are_named() -> None:
    ops = CpuOps(1)
    case = Case.random(np.random.default_rng(8), 8, 64, MAIN)
    matrix = ops.matrix(case.layout, case.parts)
    with pytest.raises(ValueError, match="part 0 holds 255 bytes, needs 256"):
        ops.matrix(case.layout, [case.parts[0][:-1], *case.parts[1:]])
    with pytest.raises(ValueError, match="expected 3 parts, got 1"):
        ops.matrix(case.layout, case.parts[:1])
    with pytest.raises(ValueError, match="input of 32 columns meets a matrix of 64"):
        ops.linear(np.zeros((1, 32), np.float32), [matrix])
    with pytest.raises(ValueError, match="id 8 is outside of the table"):
        ops.embed(np.array([8], np.int32), matrix)
    row = np.zeros((1, 64), np.float32)
    with pytest.raises(ValueError, match="the norm's weight does not fit"):
        ops.normed_linear(row, np.ones(63, np.float32), 1e-6, [matrix])
    with pytest.raises(ValueError, match=r"out must be \[1, 8\]"):
        ops.linear_onto(row, row, matrix)
    with pytest.raises(ValueError, match="do not fit together"):
        ops.swiglu(np.zeros((1, 64), np.float32), matrix, matrix, matrix)
    with pytest.raises(ValueError, match="affine bits must be"):
        native.MatrixLayout(4, 64, "affine", 5, 64)
    with pytest.raises(ValueError, match="not a multiple of the group"):
        native.MatrixLayout(4, 65, "affine", 4, 64)


@pytest.mark.parametrize("bad", [np.zeros((1, 64)), np.zeros((1, 128), np.float32)[:, ::2], np.zeros(64, np.float32)])
def test_arrays_of_another_kind_are_refused_not_copied(bad: np.ndarray) -> None:
    ops = CpuOps(1)
    case = Case.random(np.random.default_rng(9), 64, 64, MAIN)
    matrix = ops.matrix(case.layout, case.parts)
    with pytest.raises(TypeError):
        ops.linear(bad, [matrix])
    with pytest.raises(TypeError):
        ops.swiglu(bad, matrix, matrix, matrix)
    source = native.Input()
    source.bind(np.zeros((1, 64), np.float32), False)
    with pytest.raises(TypeError):
        native.linear(source, [matrix], [bad])


def test_probes_measure_something() -> None:
    native.set_threads(1)
    assert native.memory_bandwidth(1 << 22, 0.01) > 1e7
    assert native.int8_peak(0.01) > native.fma_peak(0.01) / 8 > 0
