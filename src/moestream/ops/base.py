"""The operators a backend provides. ``reference.py`` is the truth, ``cpu.py`` the native twin.

All activations are float32 and C-contiguous. A backend owns its matrices: ``matrix()`` turns the raw parts of a
``MatrixLayout`` into whatever the backend multiplies with (a native handle, a device tensor, an array).

Shape letters: T rows (tokens of all sequences of a step), H hidden size, N/K rows/columns of a matrix, E experts,
k experts per token, I expert width, Hq/Hkv query/KV heads, D head dim, R rotary dims, C conv channels,
Hk/Hv delta-net key/value heads, Dk/Dv their dims, W conv width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.encoding import ExpertLayout, MatrixLayout

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Matrix = Any
"""A backend's own matrix; only the backend that made it looks inside."""


@dataclass(frozen=True, slots=True)
class Wave:
    """Experts whose bytes are in memory, with the routed pairs that use them.

    A *pair* is one (row, choice) of the router, numbered ``row * k + choice``. Expert ``experts[i]`` serves
    ``pairs[starts[i]:starts[i + 1]]``, in increasing order. Part p of it lies at ``memory[offsets[r, p]:]``
    (any alignment), where r is ``rows[i]``, or i without rows. The memory stays valid until the next wave is asked for.
    """

    layer: int
    layout: ExpertLayout
    experts: I32  # [n]
    memory: U8  # the arena
    offsets: I64  # [n, P], or with rows any number of them
    starts: I32  # [n + 1]
    pairs: I32  # [sum]
    rows: I32 | None = None  # [n]

    def places(self, i: int) -> list[int]:
        """Where in the memory the parts of ``experts[i]`` begin [P]."""
        places: list[int] = self.offsets[i if self.rows is None else self.rows[i]].tolist()
        return places


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """Constants of one attention layer. Norm weights already hold 1 + w where the model stores w."""

    heads: int  # Hq
    kv_heads: int  # Hkv
    head_dim: int  # D
    rotary_dim: int  # R
    gated: bool  # q_proj rows are per head [D query | D gate]
    eps: float
    q_norm: F32  # [D]
    k_norm: F32  # [D]


@dataclass(slots=True)
class KVCache:
    """Keys (after rope) and values of one layer of one sequence; float32, or float16 in the fast mode."""

    k: npt.NDArray[Any]  # [Hkv, capacity, D]
    v: npt.NDArray[Any]  # [Hkv, capacity, D]
    length: int = 0


@dataclass(frozen=True, slots=True)
class DeltaNetParams:
    """Constants of one gated delta-net layer (arXiv 2412.06464). ``norm`` is a plain weight, near 1."""

    key_heads: int  # Hk
    value_heads: int  # Hv
    key_dim: int  # Dk
    value_dim: int  # Dv
    eps: float
    conv: F32  # [C, W], C = 2*Hk*Dk + Hv*Dv; conv[:, W-1] multiplies the current token
    neg_exp_a: F32  # [Hv], -exp(A_log)
    dt_bias: F32  # [Hv]
    norm: F32  # [Dv]


@dataclass(slots=True)
class DeltaState:
    """State of one gated delta-net layer of one sequence, always float32."""

    conv: F32  # [W-1, C], the last inputs before the convolution, oldest first
    s: F32  # [Hv, Dk, Dv]


AttentionStep = Callable[[F32, F32, F32, Sequence[KVCache]], F32]
"""x [T, H], cos and sin [T, R / 2], T caches -> [T, H]."""
DeltaNetStep = Callable[[F32, Sequence[DeltaState]], F32]
"""x [T, H], T states -> [T, H]."""
RouteStep = Callable[[F32, int], tuple[F32, I32, F32, F32 | None]]
"""x [T, H], k -> normed [T, H], ids [T, k], weights [T, k], shared gate [T, 1]."""


class Ops(Protocol):
    """What a model needs from a backend. Inputs are never modified unless the docstring says so."""

    name: str
    exact: bool
    """True: float32 activations everywhere. False: a backend may round activations (int8 per group, f16 KV)."""

    def matrix(self, layout: MatrixLayout, parts: Sequence[U8]) -> Matrix:
        """Wrap raw parts (1-D bytes, any alignment, kept alive by the result)."""

    def embed(self, ids: I32, table: Matrix) -> F32:
        """Rows of an encoded table: [T] -> [T, H]."""

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """x / sqrt(mean(x^2) + eps) * weight: [T, H] -> [T, H]."""

    def linear(self, x: F32, matrices: Sequence[Matrix]) -> list[F32]:
        """x W^T for matrices sharing one input, whose rounding is done once: [T, K] -> [[T, N], ...]."""

    def normed_linear(self, x: F32, norm: F32, eps: float, matrices: Sequence[Matrix]) -> tuple[F32, list[F32]]:
        """RMSNorm h of x [T, K] with weight norm [K], and its products: h [T, K], [h W^T [T, N], ...]."""

    def linear_onto(self, x: F32, rows: F32, matrix: Matrix) -> F32:
        """x + rows W^T: x [T, N], rows [T, K] -> [T, N]."""

    def swiglu(self, x: F32, gate: Matrix, up: Matrix, down: Matrix) -> F32:
        """down(silu(gate x) * up x): [T, H] -> [T, H]."""

    def route(self, logits: F32, k: int, renormalise: bool) -> tuple[I32, F32]:
        """Softmax over E, top-k (ties: lower index first; sorted by descending probability), optionally renormalised.

        [T, E] -> ids [T, k], weights [T, k].
        """

    def experts(self, x: F32, wave: Wave, k: int, out: F32) -> None:
        """Write down_e(silu(gate_e x) * up_e x) of row pair // k to ``out[pair]`` for each pair; out [T * k, H].

        A row's result must not depend on how pairs are grouped into waves.
        """

    def combine(self, x: F32, expert_out: F32, weights: F32, shared: F32 | None, shared_gate: F32 | None) -> F32:
        """x + sum_j weights[:, j] * expert_out[:, j] (in order of j) + sigmoid(shared_gate) * shared.

        x [T, H], expert_out [T * k, H], weights [T, k], shared [T, H], shared_gate [T, 1] -> [T, H].
        """

    def attention(self, q: F32, k: F32, v: F32, cos: F32, sin: F32, p: AttentionParams, cache: KVCache) -> F32:
        """Per-head q/k RMSNorm, half-split rotary, append to ``cache``, causal grouped attention, sigmoid output gate.

        One sequence: q [T, Hq * D * (2 if gated else 1)], k and v [T, Hkv * D], cos/sin [T, R / 2] -> [T, Hq * D].
        Writes rows ``cache.length .. + T`` of the cache (capacity is the caller's duty) and adds T to ``cache.length``.
        """

    def delta_net(self, u: F32, z: F32, b: F32, a: F32, p: DeltaNetParams, state: DeltaState) -> F32:
        """Causal conv + silu, l2 norms, gated delta rule (chunked when T is large), gated RMSNorm.

        One sequence: u [T, C] (q, k, v projections before the conv), z [T, Hv * Dv], b and a [T, Hv] -> [T, Hv * Dv].
        Updates ``state`` in place.
        """

    def attention_step(
        self, norm: F32, q: Matrix, k: Matrix, v: Matrix, o: Matrix, p: AttentionParams
    ) -> AttentionStep:
        """What an attention layer does to one new token of each of T sequences: x + o(attention(qkv(norm(x)))).

        Made once for a layer; every cache grows by one token, for which it must have room.
        """

    def delta_net_step(
        self, norm: F32, qkv: Matrix, z: Matrix, b: Matrix, a: Matrix, out: Matrix, p: DeltaNetParams
    ) -> DeltaNetStep:
        """What a delta-net layer does to one new token of each of T sequences: x + out(delta_net(norm(x)))."""

    def route_step(
        self, norm: F32, eps: float, router: Matrix, shared_gate: Matrix | None, renormalise: bool
    ) -> RouteStep:
        """What the experts of a layer need of x: its RMSNorm, the router's choice, and the shared expert's gate."""
