"""The reference operators against formulas written out for one row, head or token at a time."""

from __future__ import annotations

import numpy as np
import pytest

from moestream.checkpoint.encoding import Encoding, ExpertLayout, MatrixLayout
from moestream.checkpoint.quant import decode, encode
from moestream.ops.base import F32, AttentionParams, DeltaNetParams, DeltaState, KVCache, Wave
from moestream.ops.reference import ReferenceOps

OPS = ReferenceOps()
AFFINE = Encoding("affine", 4, 32)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(rng: np.random.Generator, *shape: int) -> F32:
    return rng.standard_normal(shape).astype(np.float32)


def sigmoid(x: F32) -> F32:
    return 1 / (1 + np.exp(-x))


def test_route_breaks_ties_by_index_and_sorts() -> None:
    logits = np.array([[1.0, 3.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0, 9.0]], np.float32)
    ids, weights = OPS.route(logits, 3, renormalise=False)
    assert ids.tolist() == [[1, 3, 0], [4, 0, 1]]
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, np.take_along_axis(expected, ids, axis=1), **CLOSE)
    np.testing.assert_allclose(OPS.route(logits, 3, renormalise=True)[1].sum(axis=1), 1.0, **CLOSE)


def test_route_of_nan_names_valid_experts() -> None:
    with np.errstate(invalid="ignore"):
        ids, weights = OPS.route(np.full((1, 5), np.nan, np.float32), 3, renormalise=True)
    assert sorted(ids[0].tolist()) == sorted(set(ids[0].tolist()))
    assert ((ids >= 0) & (ids < 5)).all()
    assert np.isnan(weights).all()


def test_embedding_rows_are_the_decoded_table(rng: np.random.Generator) -> None:
    layout = MatrixLayout(9, 64, AFFINE)
    parts = encode(normal(rng, 9, 64), AFFINE)
    table = OPS.matrix(layout, parts)
    ids = np.array([8, 0, 8], np.int32)
    before = OPS.embed(ids, table)
    assert np.array_equal(before, decode(layout, parts)[ids])
    OPS.linear(normal(rng, 1, 64), [table])  # a tied head decodes the whole table
    assert np.array_equal(OPS.embed(ids, table), before)


def test_experts_and_combine_follow_the_formula(rng: np.random.Generator) -> None:
    rows, k, hidden, inner = 3, 2, 64, 32
    wide, narrow = MatrixLayout(inner, hidden, AFFINE), MatrixLayout(hidden, inner, AFFINE)
    layout = ExpertLayout(wide, wide, narrow)
    parts = [[p for m in layout.matrices for p in encode(normal(rng, m.rows, m.cols), AFFINE)] for _ in range(4)]
    pad = np.zeros(5, np.uint8)  # parts at odd addresses
    memory = np.concatenate([piece for expert in parts for part in expert for piece in (pad, part)])
    sizes = np.array([[5 + part.size for part in expert] for expert in parts])
    offsets = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape) + 5
    ids = np.array([[3, 0], [0, 1], [1, 3]])
    x, weights = normal(rng, rows, hidden), normal(rng, rows, k)
    out = np.full((rows * k, hidden), np.nan, np.float32)
    for experts in ([0, 3], [1]):
        pairs = [np.flatnonzero(ids.ravel() == e) for e in experts]
        starts = np.cumsum([0, *map(len, pairs)]).astype(np.int32)
        chosen = np.array(experts, np.int32)
        OPS.experts(x, Wave(0, layout, chosen, memory, offsets[chosen], starts, np.concatenate(pairs)), k, out)
    shared, gate = normal(rng, rows, hidden), normal(rng, rows, 1)
    combined = OPS.combine(x, out, weights, shared, gate)
    for t in range(rows):
        expected = x[t].astype(np.float64) + sigmoid(gate[t]) * shared[t]
        for j in range(k):
            g, u, d = (decode(m, parts[ids[t, j]][3 * i : 3 * i + 3]) for i, m in enumerate(layout.matrices))
            a = g @ x[t]
            expected += weights[t, j] * (d @ (a * sigmoid(a) * (u @ x[t])))
        np.testing.assert_allclose(combined[t], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(OPS.combine(x, 0 * out, weights, None, None), x)


@pytest.mark.parametrize("gated", [True, False])
def test_attention_follows_the_formula(rng: np.random.Generator, gated: bool) -> None:
    heads, kv_heads, dim, rotary, cached, rows = 4, 2, 8, 4, 3, 70
    p = AttentionParams(heads, kv_heads, dim, rotary, gated, 1e-6, normal(rng, dim), normal(rng, dim))
    cache = KVCache(normal(rng, kv_heads, 80, dim), normal(rng, kv_heads, 80, dim), cached)
    q, k, v = normal(rng, rows, heads * dim * (1 + gated)), normal(rng, rows, kv_heads * dim), normal(rng, rows, 16)
    angles = normal(rng, rows, rotary // 2)

    def turned(x: F32, weight: F32, t: int) -> F32:
        x = x / np.sqrt(np.mean(x**2) + 1e-6) * weight
        a, b, c, s = x[:2], x[2:4], np.cos(angles[t]), np.sin(angles[t])
        return np.concatenate([a * c - b * s, b * c + a * s, x[4:]])

    out = OPS.attention(q, k, v, np.cos(angles), np.sin(angles), p, cache)
    assert cache.length == cached + rows
    for t in (0, 1, 63, 64, 69):
        for h in range(heads):
            query, gate = q[t].reshape(heads, -1)[h][:dim], q[t].reshape(heads, -1)[h][dim:]
            g, end = h // 2, cached + t + 1
            scores = cache.k[g, :end] @ turned(query, p.q_norm, t) / np.sqrt(dim)
            mixed = np.exp(scores - scores.max()) @ cache.v[g, :end] / np.exp(scores - scores.max()).sum()
            expected = mixed * sigmoid(gate) if gated else mixed
            np.testing.assert_allclose(out[t, h * dim : (h + 1) * dim], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.k[1, cached + 5], turned(k[5, dim:], p.k_norm, 5), rtol=1e-5, atol=1e-6)
    assert np.array_equal(cache.v[1, cached + 5], v[5, dim:])


def test_delta_net_follows_the_recurrence(rng: np.random.Generator) -> None:
    hk, hv, dk, dv, rows = 2, 4, 3, 5, 6
    channels = 2 * hk * dk + hv * dv
    p = DeltaNetParams(
        hk, hv, dk, dv, 1e-6, normal(rng, channels, 4), -np.exp(normal(rng, hv)), normal(rng, hv), normal(rng, dv)
    )
    state = DeltaState(normal(rng, 3, channels), normal(rng, hv, dk, dv))
    u, z, b, a = normal(rng, rows, channels), normal(rng, rows, hv * dv), normal(rng, rows, hv), normal(rng, rows, hv)
    past, s = np.concatenate([state.conv, u]), state.s.astype(np.float64)
    out = OPS.delta_net(u, z, b, a, p, state)
    for t in range(rows):
        y = sum(p.conv[:, j] * past[t + j] for j in range(4))
        y = y * sigmoid(y)
        for n in range(hv):
            q, k = (y[i + (n // 2) * dk :][:dk] for i in (0, hk * dk))
            q, k = (x / np.sqrt(np.sum(x**2) + 1e-6) for x in (q, k))
            s[n] *= np.exp(p.neg_exp_a[n] * np.log1p(np.exp(a[t, n] + p.dt_bias[n])))
            delta = (y[2 * hk * dk + n * dv :][:dv] - s[n].T @ k) * sigmoid(b[t, n])
            s[n] += np.outer(k, delta)
            o = s[n].T @ (q / np.sqrt(dk))
            gate = z[t, n * dv : (n + 1) * dv]
            expected = o / np.sqrt(np.mean(o**2) + 1e-6) * p.norm * gate * sigmoid(gate)
            np.testing.assert_allclose(out[t, n * dv : (n + 1) * dv], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.s, s, rtol=1e-5, atol=1e-6)
    assert np.array_equal(state.conv, u[-3:])
