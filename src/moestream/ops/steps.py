"""The steps of ``base.py`` put together from a backend's own operators: their definition, and what a backend may use.

Shape letters: as in ``base.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    Ops,
    RouteStep,
)


class ComposedSteps:
    """Steps of a backend that has the operators they consist of."""

    def attention_step(
        self: Ops, norm: F32, q: Matrix, k: Matrix, v: Matrix, o: Matrix, p: AttentionParams
    ) -> AttentionStep:
        """See ``Ops.attention_step``."""

        def step(x: F32, cos: F32, sin: F32, caches: Sequence[KVCache]) -> F32:
            _, (qs, ks, vs) = self.normed_linear(x, norm, p.eps, [q, k, v])
            mixed = []
            for i, cache in enumerate(caches):
                own = slice(i, i + 1)
                mixed.append(self.attention(qs[own], ks[own], vs[own], cos[own], sin[own], p, cache))
            return self.linear_onto(x, np.concatenate(mixed), o)

        return step

    def delta_net_step(
        self: Ops, norm: F32, qkv: Matrix, z: Matrix, b: Matrix, a: Matrix, out: Matrix, p: DeltaNetParams
    ) -> DeltaNetStep:
        """See ``Ops.delta_net_step``."""

        def step(x: F32, states: Sequence[DeltaState]) -> F32:
            _, (us, zs, bs, as_) = self.normed_linear(x, norm, p.eps, [qkv, z, b, a])
            mixed = []
            for i, state in enumerate(states):
                own = slice(i, i + 1)
                mixed.append(self.delta_net(us[own], zs[own], bs[own], as_[own], p, state))
            return self.linear_onto(x, np.concatenate(mixed), out)

        return step

    def route_step(
        self: Ops, norm: F32, eps: float, router: Matrix, shared_gate: Matrix | None, renormalise: bool
    ) -> RouteStep:
        """See ``Ops.route_step``."""
        gates = [router] if shared_gate is None else [router, shared_gate]

        def step(x: F32, k: int) -> tuple[F32, I32, F32, F32 | None]:
            h, (logits, *gate) = self.normed_linear(x, norm, eps, gates)
            return h, *self.route(logits, k, renormalise), gate[0] if gate else None

        return step
