"""The operators in numpy with float64 sums: the definition every other backend is tested against.

Also the slow fallback where no compiler was found, so loops run over experts, head groups and (delta rule) tokens.

Shape letters: as in ``base.py``; additionally S cached tokens, G query heads per KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.encoding import MatrixLayout
from moestream.checkpoint.quant import decode, decode_rows
from moestream.ops.base import F32, I32, U8, AttentionParams, DeltaNetParams, DeltaState, KVCache, Wave
from moestream.ops.steps import ComposedSteps

F64 = npt.NDArray[np.float64]

L2_EPS = 1e-6  # inside the root of the delta-net's q/k norms, fixed by the architecture
QUERY_BLOCK = 64  # query rows per attention block, bounds the score matrix


class ReferenceMatrix:
    """A matrix ``[N, K]`` decoded to float32 at its first use; the raw parts are dropped then."""

    def __init__(self, layout: MatrixLayout, parts: Sequence[U8]) -> None:
        """Keep the raw parts until they are needed."""
        self.layout = layout
        self._parts = tuple(parts)

    @cached_property
    def dense(self) -> F32:
        """The decoded values [N, K]."""
        values = decode(self.layout, self._parts)
        self._parts = ()
        return values

    def rows(self, ids: I32) -> F32:
        """Some decoded rows [T, K], without decoding the rest."""
        return decode_rows(self.layout, self._parts, ids) if self._parts else self.dense[ids]


class ReferenceOps(ComposedSteps):
    """``Ops`` in numpy. Float32 in and out, every sum in float64."""

    name = "reference"
    exact = True

    def matrix(self, layout: MatrixLayout, parts: Sequence[U8]) -> ReferenceMatrix:
        """Wrap raw parts."""
        return ReferenceMatrix(layout, parts)

    def embed(self, ids: I32, table: ReferenceMatrix) -> F32:
        """Rows of an encoded table: [T] -> [T, H]."""
        return table.rows(ids)

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """Compute x / sqrt(mean(x^2) + eps) * weight: [T, H] -> [T, H]."""
        return _f32(_rms_norm(_f64(x), weight, eps))

    def linear(self, x: F32, matrices: Sequence[ReferenceMatrix]) -> list[F32]:
        """Compute x W^T for matrices sharing one input: [T, K] -> [[T, N], ...]."""
        x64 = _f64(x)
        return [_f32(x64 @ _f64(m.dense).T) for m in matrices]

    def normed_linear(
        self, x: F32, norm: F32, eps: float, matrices: Sequence[ReferenceMatrix]
    ) -> tuple[F32, list[F32]]:
        """RMSNorm of x [T, K] and its products: h [T, K], [h W^T [T, N], ...]."""
        h = self.rms_norm(x, norm, eps)
        return h, self.linear(h, matrices)

    def linear_onto(self, x: F32, rows: F32, matrix: ReferenceMatrix) -> F32:
        """Compute x + rows W^T: x [T, N], rows [T, K] -> [T, N]."""
        return _f32(_f64(x) + _f64(rows) @ _f64(matrix.dense).T)

    def swiglu(self, x: F32, gate: ReferenceMatrix, up: ReferenceMatrix, down: ReferenceMatrix) -> F32:
        """down(silu(gate x) * up x): [T, H] -> [T, H]."""
        return _swiglu(x, gate.dense, up.dense, down.dense)

    def route(self, logits: F32, k: int, renormalise: bool) -> tuple[I32, F32]:
        """Softmax over E, top-k (ties: lower index first), optionally renormalised: [T, E] -> ids, weights [T, k].

        Ranks the logits, not their probabilities, which may round to equal values. Ids are valid for NaN logits too.
        """
        p = _softmax(_f64(logits))
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        w = np.take_along_axis(p, ids, axis=1)  # [T, k]
        if renormalise:
            w = w / w.sum(axis=1, keepdims=True)
        return ids.astype(np.int32), _f32(w)

    def experts(self, x: F32, wave: Wave, k: int, out: F32) -> None:
        """Write each pair's expert output to ``out[pair]``; out [T * k, H]. Experts are decoded at every use."""
        sizes = wave.layout.part_nbytes
        for i in range(len(wave.experts)):
            pairs = wave.pairs[wave.starts[i] : wave.starts[i + 1]]
            parts = iter([wave.memory[o : o + n] for o, n in zip(wave.places(i), sizes, strict=True)])
            gate, up, down = (decode(m, [next(parts) for _ in m.part_nbytes]) for m in wave.layout.matrices)
            out[pairs] = _swiglu(x[pairs // k], gate, up, down)

    def combine(self, x: F32, expert_out: F32, weights: F32, shared: F32 | None, shared_gate: F32 | None) -> F32:
        """Compute x + sum_j weights[:, j] * expert_out[:, j] + sigmoid(shared_gate) * shared -> [T, H]."""
        rows, k = weights.shape
        y = _f64(x)
        pair_out = expert_out.reshape(rows, k, -1)  # [T, k, H]
        for j in range(k):
            y = y + _f64(weights[:, j : j + 1]) * pair_out[:, j]
        if shared is not None:
            gate = 1.0 if shared_gate is None else _sigmoid(_f64(shared_gate))
            y = y + gate * shared
        return _f32(y)

    def attention(self, q: F32, k: F32, v: F32, cos: F32, sin: F32, p: AttentionParams, cache: KVCache) -> F32:
        """Causal grouped attention of one sequence over ``cache``, which grows by T; see ``Ops.attention``."""
        rows, d = len(q), p.head_dim
        query = _f64(q).reshape(rows, p.heads, -1)  # [T, Hq, D or 2D]: per head D query rows, then D gate rows
        key = _rotate(_rms_norm(_f64(k).reshape(rows, p.kv_heads, d), p.k_norm, p.eps), cos, sin)
        start, end = cache.length, cache.length + rows
        cache.k[:, start:end] = key.swapaxes(0, 1)
        cache.v[:, start:end] = v.reshape(rows, p.kv_heads, d).swapaxes(0, 1)
        cache.length = end

        heads = _rotate(_rms_norm(query[..., :d], p.q_norm, p.eps), cos, sin) / np.sqrt(d)  # [T, Hq, D]
        group = p.heads // p.kv_heads  # G: query head h reads KV head h // G
        out = np.empty((rows, p.heads, d))
        for g in range(p.kv_heads):
            keys, values = _f64(cache.k[g, :end]), _f64(cache.v[g, :end])  # [S, D]
            own = slice(g * group, (g + 1) * group)
            for t in range(0, rows, QUERY_BLOCK):
                block = heads[t : t + QUERY_BLOCK, own]  # [B, G, D]
                seen = np.arange(end) <= start + t + np.arange(len(block))[:, None]  # [B, S]
                scores = np.where(seen[:, None], block @ keys.T, -np.inf)  # [B, G, S]
                out[t : t + QUERY_BLOCK, own] = _softmax(scores) @ values
        if p.gated:
            out *= _sigmoid(query[..., d:])
        return _f32(out.reshape(rows, -1))

    def delta_net(self, u: F32, z: F32, b: F32, a: F32, p: DeltaNetParams, state: DeltaState) -> F32:
        """Gated delta-net of one sequence in its recurrent form; see ``Ops.delta_net``."""
        rows, kd = len(u), p.key_heads * p.key_dim
        y = _causal_conv(u, p.conv, state)
        y = y * _sigmoid(y)
        repeat = p.value_heads // p.key_heads  # value head n uses key head n // repeat
        q = _l2_norm(y[:, :kd].reshape(rows, p.key_heads, p.key_dim)).repeat(repeat, axis=1) / np.sqrt(p.key_dim)
        k = _l2_norm(y[:, kd : 2 * kd].reshape(rows, p.key_heads, p.key_dim)).repeat(repeat, axis=1)  # [T, Hv, Dk]
        v = y[:, 2 * kd :].reshape(rows, p.value_heads, p.value_dim)
        beta = _sigmoid(_f64(b))  # [T, Hv]
        decay = np.exp(p.neg_exp_a * np.logaddexp(0.0, _f64(a) + p.dt_bias))  # [T, Hv]

        s = _f64(state.s)  # [Hv, Dk, Dv]
        out = np.empty((rows, p.value_heads, p.value_dim))
        for t in range(rows):
            s *= decay[t, :, None, None]
            delta = (v[t] - (k[t, :, None] @ s)[:, 0]) * beta[t, :, None]  # [Hv, Dv]
            s += k[t, :, :, None] * delta[:, None]
            out[t] = (q[t, :, None] @ s)[:, 0]
        state.s[:] = s
        gate = _f64(z).reshape(out.shape)
        return _f32((_rms_norm(out, p.norm, p.eps) * gate * _sigmoid(gate)).reshape(rows, -1))


def _f32(x: F64) -> F32:
    return np.ascontiguousarray(x, dtype=np.float32)


def _f64(x: npt.NDArray[np.floating]) -> F64:
    return x.astype(np.float64)


def _sigmoid(x: F64) -> F64:
    y: F64 = np.exp(-np.logaddexp(0.0, -x))  # overflows for no finite x
    return y


def _softmax(x: F64) -> F64:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    p: F64 = e / e.sum(axis=-1, keepdims=True)
    return p


def _rms_norm(x: F64, weight: F32, eps: float) -> F64:
    y: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return y


def _l2_norm(x: F64) -> F64:
    y: F64 = x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + L2_EPS)
    return y


def _swiglu(x: F32, gate: F32, up: F32, down: F32) -> F32:
    x64 = _f64(x)
    g = x64 @ _f64(gate).T
    return _f32((g * _sigmoid(g) * (x64 @ _f64(up).T)) @ _f64(down).T)


def _rotate(x: F64, cos: F32, sin: F32) -> F64:
    """Half-split rotary on the first R dims of [T, heads, D]; cos/sin [T, R / 2]."""
    half = cos.shape[1]
    a, b = x[..., :half], x[..., half : 2 * half]
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s, x[..., 2 * half :]], axis=-1)


def _causal_conv(u: F32, weight: F32, state: DeltaState) -> F64:
    """Depthwise causal convolution [T, C] continuing from ``state.conv``, which then holds the last W - 1 inputs."""
    width = weight.shape[1]
    padded = np.concatenate([state.conv, u])  # [W - 1 + T, C]
    state.conv[:] = padded[len(u) :]
    y = np.zeros(u.shape)
    for j in range(width):
        y += _f64(padded[j : j + len(u)]) * weight[:, j]
    return y
