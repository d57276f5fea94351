"""The steps of ``base.py`` on the CPU: one native call each, which makes every intermediate value itself.

Shape letters: as in ``base.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moestream.ops.base import (
    F32,
    I32,
    AttentionParams,
    AttentionStep,
    DeltaNetParams,
    DeltaNetStep,
    DeltaState,
    KVCache,
    Matrix,
    RouteStep,
)

_native: Any = importlib.import_module("moestream._native")  # compiled


class NativeSteps:
    """Steps of the native backend; a wrong shape raises ``ValueError`` that names it, when the step is made or run."""

    exact: bool

    def attention_step(
        self, norm: F32, q: Matrix, k: Matrix, v: Matrix, o: Matrix, p: AttentionParams
    ) -> AttentionStep:
        """See ``Ops.attention_step``."""
        native = _native.AttentionStep(
            norm, q, k, v, o, p.q_norm, p.k_norm, p.heads, p.kv_heads, p.head_dim, p.rotary_dim, p.gated, p.eps
        )

        def step(x: F32, cos: F32, sin: F32, caches: Sequence[KVCache]) -> F32:
            out = np.empty_like(x)
            keys, values = [cache.k for cache in caches], [cache.v for cache in caches]
            native.run(x, cos, sin, keys, values, [cache.length for cache in caches], self.exact, out)
            for cache in caches:
                cache.length += 1
            return out

        return step

    def delta_net_step(
        self, norm: F32, qkv: Matrix, z: Matrix, b: Matrix, a: Matrix, out: Matrix, p: DeltaNetParams
    ) -> DeltaNetStep:
        """See ``Ops.delta_net_step``."""
        native = _native.DeltaNetStep(
            norm, qkv, z, b, a, out, p.conv, p.neg_exp_a, p.dt_bias, p.norm,
            p.key_heads, p.value_heads, p.key_dim, p.value_dim, p.eps,
        )  # fmt: skip

        def step(x: F32, states: Sequence[DeltaState]) -> F32:
            y = np.empty_like(x)
            native.run(x, [state.conv for state in states], [state.s for state in states], self.exact, y)
            return y

        return step

    def route_step(
        self, norm: F32, eps: float, router: Matrix, shared_gate: Matrix | None, renormalise: bool
    ) -> RouteStep:
        """See ``Ops.route_step``."""
        native = _native.RouteStep(norm, eps, router, shared_gate, renormalise)

        def step(x: F32, k: int) -> tuple[F32, I32, F32, F32 | None]:
            rows = len(x)
            h, ids, weights = np.empty_like(x), np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
            gate = None if shared_gate is None else np.empty((rows, 1), np.float32)
            native.run(x, self.exact, h, ids, weights, gate)
            return h, ids, weights, gate

        return step
