"""The native half of ``CpuOps`` that works on sequences: norms, routing, attention and gated delta-net.

Shape letters: as in ``base.py``. Every method allocates its result; the kernels
(``native/cpu/sequence``) fill it without the GIL.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from moestream.ops.base import F32, I32, AttentionParams, DeltaNetParams, DeltaState, KVCache

_native: Any = importlib.import_module("moestream._native")  # compiled; has no stub


class SequenceOps:
    """Operators on rows and sequences. Float32 in and out; only the KV cache may be float16.

    A sequence's result depends neither on the number of threads nor on other sequences. Arrays must be C-contiguous
    float32; a wrong shape raises ``ValueError`` naming the argument, a wrong type ``TypeError``.
    """

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """Compute x / sqrt(mean(x^2) + eps) * weight: [T, H] -> [T, H]."""
        out = np.empty_like(x)
        _native.rms_norm(x, weight, eps, out)
        return out

    def route(self, logits: F32, k: int, renormalise: bool) -> tuple[I32, F32]:
        """Softmax over E, top-k by logit (ties: lower index first), optionally renormalised: [T, E] -> [T, k] twice.

        NaN logits rank last and make every weight of their row NaN; ids are valid and distinct all the same.
        """
        ids = np.empty((len(logits), k), dtype=np.int32)
        weights = np.empty((len(logits), k), dtype=np.float32)
        _native.route(logits, renormalise, ids, weights)
        return ids, weights

    def combine(self, x: F32, expert_out: F32, weights: F32, shared: F32 | None, shared_gate: F32 | None) -> F32:
        """Compute x + sum_j weights[:, j] * expert_out[:, j] (in order of j) + sigmoid(shared_gate) * shared."""
        out = np.empty_like(x)
        _native.combine(x, expert_out, weights, shared, shared_gate, out)
        return out

    def attention(self, q: F32, k: F32, v: F32, cos: F32, sin: F32, p: AttentionParams, cache: KVCache) -> F32:
        """Causal grouped attention of one sequence over ``cache``, which grows by T; see ``Ops.attention``.

        Raises:
            ValueError: a shape does not fit ``p``, or the cache has no room for T more tokens.
        """
        out = np.empty((len(q), p.heads * p.head_dim), dtype=np.float32)
        _native.attention(
            q, k, v, cos, sin, p.q_norm, p.k_norm, cache.k, cache.v, cache.length,
            p.heads, p.kv_heads, p.head_dim, p.rotary_dim, p.gated, p.eps, out,
        )  # fmt: skip
        cache.length += len(q)
        return out

    def delta_net(self, u: F32, z: F32, b: F32, a: F32, p: DeltaNetParams, state: DeltaState) -> F32:
        """Gated delta-net of one sequence, which moves ``state`` on; see ``Ops.delta_net``.

        One to three tokens run one by one, more in chunks; the two agree to float32 rounding.

        Raises:
            ValueError: a shape does not fit ``p``.
        """
        out = np.empty_like(z)
        _native.delta_net(
            u, z, b, a, p.conv, p.neg_exp_a, p.dt_bias, p.norm, state.conv, state.s,
            p.key_heads, p.value_heads, p.key_dim, p.value_dim, p.eps, out,
        )  # fmt: skip
        return out
