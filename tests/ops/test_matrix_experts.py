"""Routed experts: against float64, and the same bits however the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
from matrix_cases import MAIN, Layer, check, swiglu_bound

from moestream.checkpoint.encoding import Encoding

native = pytest.importorskip("moestream._native", reason="the native kernels are not built")
from moestream.ops.cpu import CpuOps  # noqa: E402

HIDDEN, WIDTH, EXPERTS, K = 256, 320, 6, 3
SOME = [MAIN, Encoding("affine", 8, 32, "f16"), Encoding("affine", 3, 64, "f32"), Encoding("bf16")]


def routed(rng: np.random.Generator, count: int) -> np.ndarray:
    """Ids [T, k] that favour the first experts, as real routers do; the last expert gets nothing."""
    odds = 0.5 ** np.arange(EXPERTS - 1)
    return np.stack([rng.choice(EXPERTS - 1, K, replace=False, p=odds / odds.sum()) for _ in range(count)])


def run(ops: CpuOps, layer: Layer, x: np.ndarray, ids: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    out = np.full((len(x) * K, HIDDEN), np.nan, np.float32)
    for wave in layer.waves(ids, groups):
        ops.experts(x, wave, K, out)
    return out


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("encoding", SOME, ids=lambda e: e.name)
def test_every_pair_is_within_its_bound(tier: str, exact: bool, encoding: Encoding) -> None:
    rng = np.random.default_rng(1)
    layer = Layer.random(rng, EXPERTS, HIDDEN, WIDTH, encoding)
    ops = CpuOps(2, exact)
    for count in (1, 5, 40, 150):
        x = rng.standard_normal((count, HIDDEN)).astype(np.float32)
        ids = routed(rng, count)
        out = run(ops, layer, x, ids, [list(range(EXPERTS))])
        for e, expert in enumerate(layer.experts):
            pairs = np.flatnonzero(ids.reshape(-1) == e)
            want, bound = swiglu_bound(x[pairs // K], *expert, exact)
            check(out[pairs], want, bound)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_waves_and_threads_do_not_change_a_bit(tier: str, exact: bool) -> None:
    rng = np.random.default_rng(2)
    layer = Layer.random(rng, EXPERTS, HIDDEN, WIDTH, MAIN)
    for count in (1, 2, 30, 300):
        x = rng.standard_normal((count, HIDDEN)).astype(np.float32)
        ids = routed(rng, count)
        want = run(CpuOps(1, exact), layer, x, ids, [list(range(EXPERTS))])
        assert np.isfinite(want).all()
        for threads in (1, 2, 3):
            for groups in ([[e] for e in range(EXPERTS)], [[5, 1, 3], [0, 4, 2]], [[2, 0], [1], [5, 4, 3]]):
                got = run(CpuOps(threads, exact), layer, x, ids, groups)
                np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_threads_do_not_change_a_bit_of_linear(tier: str) -> None:
    rng = np.random.default_rng(3)
    gate, up, down = Layer.random(rng, 1, HIDDEN, 1000 // 64 * 64, MAIN).experts[0]
    for exact in (True, False):
        for count in (1, 3, 20):
            x = rng.standard_normal((count, HIDDEN)).astype(np.float32)
            results = []
            for threads in (1, 2, 3):
                ops = CpuOps(threads, exact)
                matrices = [ops.matrix(c.layout, c.parts) for c in (gate, up, down)]
                results.append([*ops.linear(x, matrices[:2]), ops.swiglu(x, *matrices)])
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_the_input_is_rounded_again_when_it_may_have_changed() -> None:
    """Waves of one layer share a rounded input; another layer, array or call in between never does."""
    rng = np.random.default_rng(4)
    layer = Layer.random(rng, EXPERTS, HIDDEN, WIDTH, MAIN)
    ops, fresh = CpuOps(1), lambda: CpuOps(1)
    ids = routed(rng, 40)
    groups = [[0, 1, 2], [3, 4, 5]]
    x = rng.standard_normal((40, HIDDEN)).astype(np.float32)
    first, second = layer.waves(ids, groups)
    out = np.zeros((40 * K, HIDDEN), np.float32)
    ops.experts(x, first, K, out)
    gate = layer.experts[0][0]
    ops.linear(x + 1, [ops.matrix(gate.layout, gate.parts)])  # the router or shared expert of something else
    ops.experts(x, second, K, out)
    np.testing.assert_array_equal(out, run(fresh(), layer, x, ids, groups))

    other = x.copy()
    for array, number in ((other, 0), (x, 1)):
        np.multiply(array, 2, out=array)  # in place: only the layer or the identity of the array tells
        for wave in layer.waves(ids, groups, layer=number):
            ops.experts(array, wave, K, out)
        np.testing.assert_array_equal(out, run(fresh(), layer, array, ids, groups))


def test_wrong_waves_are_named() -> None:
    rng = np.random.default_rng(5)
    layer = Layer.random(rng, EXPERTS, HIDDEN, WIDTH, MAIN)
    ops = CpuOps(1)
    x = rng.standard_normal((2, HIDDEN)).astype(np.float32)
    (wave,) = layer.waves(routed(rng, 2), [list(range(EXPERTS))])
    with pytest.raises(ValueError, match=r"out must be \[6, 256\]"):
        ops.experts(x, wave, K, np.zeros((5, HIDDEN), np.float32))
    with pytest.raises(ValueError, match="a pair is outside of the input"):
        ops.experts(x[:1], wave, K, np.zeros((3, HIDDEN), np.float32))
    wave.offsets[-1, -1] += 1
    with pytest.raises(ValueError, match="part 8 of an expert lies outside of the memory"):
        ops.experts(x, wave, K, np.zeros((6, HIDDEN), np.float32))
