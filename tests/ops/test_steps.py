"""Native steps against the same steps put together from operators, which have tests of their own: bit for bit."""

import gc

import numpy as np
import pytest
from matrix_cases import MAIN, Case

_native = pytest.importorskip("moestream._native")

from moestream.checkpoint.encoding import Encoding  # noqa: E402
from moestream.ops.base import AttentionParams, DeltaNetParams, DeltaState, KVCache  # noqa: E402
from moestream.ops.cpu import CpuOps  # noqa: E402
from moestream.ops.steps import ComposedSteps  # noqa: E402

pytestmark = pytest.mark.usefixtures("tier")

HIDDEN = 192
COUNTS = [1, 2, 5]  # sequences


@pytest.fixture(params=[False, True], ids=["fast", "exact"])
def ops(request):
    return CpuOps(2, request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(12)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def matrix(ops, rng, rows, cols, encoding=MAIN):
    case = Case.random(rng, rows, cols, encoding)
    return ops.matrix(case.layout, case.parts)


def caches(rng, p, count, exact):
    dtype = np.float32 if exact else np.float16
    shape = (p.kv_heads, 300, p.head_dim)
    return [
        KVCache(normal(rng, *shape).astype(dtype), normal(rng, *shape).astype(dtype), 7 + 60 * i) for i in range(count)
    ]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("gated", [False, True])
def test_attention_step(ops, rng, count, gated):
    p = AttentionParams(6, 2, 64, 32, gated, 1e-6, 1 + normal(rng, 64) / 4, 1 + normal(rng, 64) / 4)
    made = [matrix(ops, rng, rows, HIDDEN) for rows in (6 * 64 * (1 + gated), 128, 128)]
    weights = (1 + normal(rng, HIDDEN) / 4, *made, matrix(ops, rng, HIDDEN, 384, Encoding("affine", 8, 64)), p)
    x, angles = normal(rng, count, HIDDEN), rng.uniform(0, 6, (count, 16))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    own, theirs = (caches(np.random.default_rng(3), p, count, ops.exact) for _ in range(2))
    native, composed = ops.attention_step(*weights), ComposedSteps.attention_step(ops, *weights)
    for _ in range(2):  # the second token finds the first one's keys
        got, want = native(x, cos, sin, own), composed(x, cos, sin, theirs)
        np.testing.assert_array_equal(got, want)
        for a, b in zip(own, theirs, strict=True):
            assert a.length == b.length
            np.testing.assert_array_equal(a.k, b.k)
            np.testing.assert_array_equal(a.v, b.v)
        x = got


@pytest.mark.parametrize("count", COUNTS)
def test_delta_net_step(ops, rng, count):
    hk, hv, dk, dv = 2, 4, 32, 16
    channels = 2 * hk * dk + hv * dv
    p = DeltaNetParams(
        hk, hv, dk, dv, 1e-6, normal(rng, channels, 4), -np.exp(normal(rng, hv)), normal(rng, hv), normal(rng, dv)
    )
    made = [matrix(ops, rng, rows, HIDDEN) for rows in (channels, hv * dv, hv, hv)]
    weights = (1 + normal(rng, HIDDEN) / 4, *made, matrix(ops, rng, HIDDEN, hv * dv), p)
    x = normal(rng, count, HIDDEN)
    own, theirs = (
        [DeltaState(normal(r, 3, channels), normal(r, hv, dk, dv)) for _ in range(count)]
        for r in (np.random.default_rng(3), np.random.default_rng(3))
    )
    native, composed = ops.delta_net_step(*weights), ComposedSteps.delta_net_step(ops, *weights)
    for _ in range(2):
        got, want = native(x, own), composed(x, theirs)
        np.testing.assert_array_equal(got, want)
        for a, b in zip(own, theirs, strict=True):
            np.testing.assert_array_equal(a.conv, b.conv)
            np.testing.assert_array_equal(a.s, b.s)
        x = got


@pytest.mark.parametrize("count", [*COUNTS, 40])
@pytest.mark.parametrize("shared", [False, True])
def test_route_step(ops, rng, count, shared):
    router = matrix(ops, rng, 60, HIDDEN, Encoding("bf16"))
    gate = matrix(ops, rng, 1, HIDDEN, Encoding("affine", 8, 64)) if shared else None
    weights = (1 + normal(rng, HIDDEN) / 4, 1e-6, router, gate, True)
    x = normal(rng, count, HIDDEN)
    got, want = ops.route_step(*weights)(x, 4), ComposedSteps.route_step(ops, *weights)(x, 4)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        np.testing.assert_array_equal(a, b)


def test_a_step_keeps_what_it_points_into(ops, rng):
    norm = np.ones(HIDDEN, np.float32)
    step = ops.route_step(norm, 1e-6, matrix(ops, rng, 60, HIDDEN), matrix(ops, rng, 1, HIDDEN), True)
    x = normal(rng, 1, HIDDEN)
    before = step(x, 4)
    del norm
    gc.collect()
    rubbish = [np.full(HIDDEN * 60, np.nan, np.float32) for _ in range(20)]
    for a, b in zip(before, step(x, 4), strict=True):
        np.testing.assert_array_equal(a, b)
    del rubbish


def test_wrong_shapes_are_named(ops, rng):
    p = AttentionParams(2, 1, 64, 32, False, 1e-6, np.ones(64, np.float32), np.ones(64, np.float32))
    norm = np.ones(HIDDEN, np.float32)
    q, k, o = matrix(ops, rng, 128, HIDDEN), matrix(ops, rng, 64, HIDDEN), matrix(ops, rng, HIDDEN, 128)
    with pytest.raises(ValueError, match=r"q must be \[128, 192\], got \[64, 192\]"):
        ops.attention_step(norm, k, k, k, o, p)
    with pytest.raises(ValueError, match=r"norm must be \[192\]"):
        ops.attention_step(norm[:-1], q, k, k, o, p)
    step = ops.attention_step(norm, q, k, k, o, p)
    row, angles = normal(rng, 1, HIDDEN), np.zeros((1, 16), np.float32)
    full = KVCache(np.zeros((1, 4, 64), np.float32), np.zeros((1, 4, 64), np.float32), 4)
    with pytest.raises(ValueError, match="holds 4 of 4 tokens, no room for 1 more"):
        step(row, angles, angles, [full])
    full.length = 2**63 - 1
    with pytest.raises(ValueError, match="no room for 1 more"):
        step(row, angles, angles, [full])
    with pytest.raises(ValueError, match="one cache for each row"):
        step(row, angles, angles, [])
    delta = DeltaNetParams(1, 1, 32, 64, 1e-6, normal(rng, 128, 4), norm[:1], norm[:1], norm[:64])
    one = matrix(ops, rng, 1, HIDDEN)
    delta_step = ops.delta_net_step(norm, q, k, one, one, matrix(ops, rng, HIDDEN, 64), delta)
    with pytest.raises(ValueError, match="one state for each row"):
        delta_step(row, [])
    route = ops.route_step(norm, 1e-6, q, None, True)
    with pytest.raises(ValueError, match="k must be between 1 and the number of experts 128"):
        route(row, 129)
