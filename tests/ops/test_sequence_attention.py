"""Attention against the float64 reference: every instruction tier, cache type and code path."""

import numpy as np
import pytest

_native = pytest.importorskip("moestream._native")

from moestream.ops.base import AttentionParams, KVCache  # noqa: E402
from moestream.ops.cpu_sequence import SequenceOps  # noqa: E402
from moestream.ops.reference import ReferenceOps  # noqa: E402

pytestmark = pytest.mark.usefixtures("tier")  # every test, on each tier

EPS = 2.0**-24
HALF_EPS = 2.0**-11
BFLOAT_EPS = 2.0**-8
FEW_ROWS = 16  # rows of a key head up to which heads of no multiple of 32 are not rounded to bfloat16
OPS, REFERENCE = SequenceOps(), ReferenceOps()
NORM_MAX = 1.5

# Query heads, KV heads, head dim, rotary dims, gated: groups of 1 to 16, rotary on all, a quarter or none of the head.
GEOMETRIES = [
    (4, 4, 32, 32, False),
    (4, 2, 64, 16, True),
    (8, 1, 128, 128, False),
    (16, 1, 256, 64, True),
    (12, 4, 80, 20, True),
    (3, 1, 36, 0, False),
]
# Tokens, tokens already cached: one and several rows and key blocks, one and several splits of the context.
STEPS = [(1, 0), (1, 700), (2, 63), (17, 250), (64, 0), (65, 5), (150, 40)]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, np.nan, dtype))


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def make_params(rng, geometry):
    norms = rng.uniform(0.5, NORM_MAX, (2, geometry[2])).astype(np.float32)
    return AttentionParams(*geometry, 1e-6, norms[0], norms[1])


def make_cache(rng, p, dtype, past, capacity):
    """A cache of `past` tokens; what is not written yet is NaN."""
    k, v = np.full((2, p.kv_heads, capacity, p.head_dim), np.nan, dtype)
    k[:, :past] = rng.uniform(-1, 1, (p.kv_heads, past, p.head_dim))
    v[:, :past] = normal(rng, p.kv_heads, past, p.head_dim)
    return KVCache(k, v, past)


def copy_of(cache):
    return KVCache(cache.k.copy(), cache.v.copy(), cache.length)


def make_inputs(rng, p, tokens):
    angles = rng.uniform(0, 2 * np.pi, (tokens, p.rotary_dim // 2))
    return (
        normal(rng, tokens, p.heads * p.head_dim * (2 if p.gated else 1)),
        normal(rng, tokens, p.kv_heads * p.head_dim) * 3,
        normal(rng, tokens, p.kv_heads * p.head_dim),
        np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32),
    )


def error_bound(p, cache, rows=1):
    """A score is at most sqrt(D) * |q_norm| * |k_norm|; its error moves a convex sum of values."""
    score = np.sqrt(p.head_dim) * NORM_MAX**2
    values = np.abs(cache.v[:, : cache.length].astype(np.float32)).max()
    rounding = 0.0
    if cache.k.dtype == np.float16:
        rounding = 4 * HALF_EPS / np.sqrt(p.head_dim)  # a key rounded the other way
        if rows > FEW_ROWS or p.head_dim % 32 == 0:
            rounding += 4 * BFLOAT_EPS  # one unit each for weights and values, two for scores: errors differ by key
    return ((score + 8) * EPS + rounding) * values


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("tokens", "past"), STEPS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_attention(rng, geometry, tokens, past, dtype):
    p = make_params(rng, geometry)
    cache = make_cache(rng, p, dtype, past, past + tokens + 3)
    want_cache = copy_of(cache)
    inputs = make_inputs(rng, p, tokens)
    got, want = OPS.attention(*inputs, p, cache), REFERENCE.attention(*inputs, p, want_cache)
    assert cache.length == past + tokens
    assert np.isnan(cache.k[:, cache.length :]).all()
    assert np.isnan(cache.v[:, cache.length :]).all()
    end = slice(0, cache.length)
    assert np.array_equal(cache.v[:, end], want_cache.v[:, end])
    keys, want_keys = (c.k[:, end].astype(np.float64) for c in (cache, want_cache))
    rounding = 2 * HALF_EPS if dtype == np.float16 else 16 * EPS  # a half may round to either neighbour
    assert np.all(np.abs(keys - want_keys) <= rounding * np.abs(want_keys) + 16 * EPS * np.abs(want_keys).max())
    assert np.abs(got - want).max() <= error_bound(p, cache, tokens * p.heads // p.kv_heads)


@pytest.mark.parametrize("geometry", GEOMETRIES[:4])
def test_pieces_equal_one_piece(rng, geometry):
    p = make_params(rng, geometry)
    inputs = make_inputs(rng, p, 180)
    whole, pieces = (make_cache(np.random.default_rng(1), p, np.float32, 10, 190) for _ in range(2))
    want = OPS.attention(*inputs, p, whole)
    got, at = [], 0
    for size in (1, 17, 64, 2, 95, 1):
        got.append(OPS.attention(*(x[at : at + size] for x in inputs), p, pieces))
        at += size
    assert np.array_equal(whole.k, pieces.k)
    assert np.abs(np.concatenate(got) - want).max() <= 2 * error_bound(p, whole)


@pytest.mark.parametrize(("tokens", "past"), [(1, 2100), (30, 1000), (100, 0)])
def test_threads_do_not_show(rng, threads, tokens, past):
    p = make_params(rng, (8, 2, 64, 64, True))
    cache, inputs = make_cache(rng, p, np.float16, past, past + tokens), make_inputs(rng, p, tokens)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(OPS.attention(*inputs, p, copy_of(cache)))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@pytest.mark.parametrize("tokens", [1, 70])
def test_an_earlier_call_leaves_no_trace(rng, tokens):
    """Kernels reuse scratch memory; NaN of a failed request must not reach the next one."""
    p = make_params(rng, GEOMETRIES[3])
    inputs = make_inputs(rng, p, tokens)
    want = OPS.attention(*inputs, p, make_cache(np.random.default_rng(1), p, np.float32, 600, 700))
    bad = [np.full_like(x, np.nan) for x in inputs]
    assert np.isnan(OPS.attention(*bad, p, make_cache(rng, p, np.float32, 600, 700))).all()
    got = OPS.attention(*inputs, p, make_cache(np.random.default_rng(1), p, np.float32, 600, 700))
    assert np.array_equal(got, want)


@pytest.mark.parametrize("tokens", [1, 40])
def test_large_scores_do_not_overflow(rng, tokens):
    p = AttentionParams(4, 2, 64, 64, False, 1e-6, *np.full((2, 64), 40, np.float32))
    cache, inputs = make_cache(rng, p, np.float32, 0, tokens), make_inputs(rng, p, tokens)
    want = REFERENCE.attention(*inputs, p, copy_of(cache))
    score = np.sqrt(64) * 40**2
    got = OPS.attention(*inputs, p, cache)
    assert np.abs(got - want).max() <= (score + 8) * EPS * np.abs(inputs[2]).max()


def test_half_storage_rounds_to_nearest(rng):
    """Values go to the cache as they are: every half, the midpoints between them, overflow and denormals."""
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    midpoints = (halves[1:] + halves[:-1]) / 2
    special = np.array([65519.99, 65520, 1e30, 1e-8, 2.0**-25, 2.0**-24, np.inf, -0.0], np.float32)
    v = np.concatenate([halves, midpoints, np.nextafter(midpoints, 0), -halves, special])
    v = np.resize(v, (-(-len(v) // 64), 64)).astype(np.float32)
    p = make_params(rng, (1, 1, 64, 0, False))
    cache = make_cache(rng, p, np.float16, 0, len(v))
    q = np.zeros((len(v), 64), np.float32)
    OPS.attention(q, q, v, q[:, :0], q[:, :0], p, cache)
    with np.errstate(over="ignore"):
        assert np.array_equal(cache.v[0].view(np.uint16), v.astype(np.float16).view(np.uint16))


def test_wrong_shapes_are_named(rng):
    p = make_params(rng, GEOMETRIES[1])
    inputs = make_inputs(rng, p, 3)
    with pytest.raises(ValueError, match="the cache holds 2 of 4 tokens, no room for 3 more"):
        OPS.attention(*inputs, p, make_cache(rng, p, np.float32, 2, 4))
    with pytest.raises(ValueError, match=r"q must be \[3, 512\], got \[3, 256\]"):
        OPS.attention(np.zeros((3, 256), np.float32), *inputs[1:], p, make_cache(rng, p, np.float32, 2, 9))
    with pytest.raises(ValueError, match="both be float32 or both float16"):
        OPS.attention(*inputs, p, make_cache(rng, p, np.float64, 2, 9))
    cache = make_cache(rng, p, np.float32, 2, 9)
    with pytest.raises(ValueError, match=r"cos must be \[3, 8\]"):
        OPS.attention(*inputs[:3], inputs[3][:2], inputs[4], p, cache)
    assert cache.length == 2
