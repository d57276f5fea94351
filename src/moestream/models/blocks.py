"""The blocks that layers are made of, written once for all architectures.

Shape letters: as in ``ops/base.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

from moestream.errors import MoestreamError, ReadError
from moestream.models.batch import Batch, Segment
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
    Wave,
)
from moestream.system import trim_heap

FEW_ROWS = 512
"""Rows of expert outputs that any pass may keep."""
RouterOverride = Callable[[int, int], I32]
"""(layer, T) -> expert ids [T, k] to use instead of the router's choice."""


class ExpertStream(Protocol):
    """The experts of one layer of one step, as their bytes arrive."""

    @property
    def failures(self) -> Sequence[tuple[I32, ReadError]]:
        """After the loop: pairs whose expert could not be read. Every other pair was in exactly one wave."""

    def __iter__(self) -> Iterator[Wave]:
        """Yield experts that are in memory; a wave is valid until the next one is asked for."""


class ExpertSource(Protocol):
    """Where experts come from: the streaming store, or anything that yields the same waves."""

    def stream(self, layer: int, ids: I32) -> ExpertStream:
        """Submit every read that ids [T, k] need of ``layer``, and return at once."""

    def at_rest(self) -> AbstractContextManager[None]:
        """While entered, the streams of another pass may run; then the stream that has not ended goes on."""


class ReadAhead(Protocol):
    """Takes experts that a layer will probably choose, to read them while the disk has nothing else to do."""

    def predictions(self, layer: int, rows: int) -> int:
        """How many experts to predict for each of so many rows of ``layer``; 0: reading ahead would not pay."""

    def prefetch(self, layer: int, ids: I32) -> None:
        """Experts [T, m] that ``layer``, the next to be streamed, will probably choose; the likeliest come first."""


LookAhead = Callable[[F32, int], None]
"""(residual [T, H], layer): guess from it what the layer after ``layer`` will choose."""


@dataclass(slots=True)
class Step:
    """What the blocks share during one forward pass."""

    ops: Ops
    experts: ExpertSource
    active: int  # k
    router_override: RouterOverride | None
    batch: Batch
    cos: F32  # [T, R / 2]
    sin: F32  # [T, R / 2]
    scratch: Scratch
    look_ahead: LookAhead | None = None


@dataclass(slots=True)
class Scratch:
    """Memory for expert outputs, reused by all layers of a pass and by passes that need about as much."""

    rows: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def fit(self, rows: int) -> None:
        """Give memory back that a pass of so many rows does not need."""
        if len(self.rows) > max(rows, FEW_ROWS):
            self.rows = np.empty((0, 0), np.float32)
            trim_heap()

    def take(self, rows: int, cols: int) -> F32:
        """Uninitialised [rows, cols], valid until the next call."""
        if self.rows.shape[0] < rows or self.rows.shape[1] != cols:
            self.rows = np.empty((rows, cols), np.float32)
        return self.rows[:rows]


class Mixer(Protocol):
    """Mixes the rows of each sequence, advancing the layer's states."""

    def forward(self, x: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Residual x [T, H] plus what is mixed -> [T, H]; yields where the pass may rest, as ``Model.layers``."""


class Mlp(Protocol):
    """Works on each row alone."""

    def forward(self, x: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Residual x [T, H] plus the MLP of its norm -> [T, H]; yields where the pass may rest, as ``Model.layers``."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal grouped-query attention."""

    norm: F32  # [H]
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    params: AttentionParams
    step: AttentionStep

    def forward(self, x: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Attend within each sequence: [T, H] -> [T, H], with rests between blocks of rows."""
        if step.batch.decodes:
            return self.step(x, step.cos, step.sin, [_cache(s, layer) for s in step.batch.segments])
        out: list[F32] = []
        for block in step.batch.blocks():
            if out:
                yield type(self).__name__
            within = slice(block[0][1].start, block[-1][1].stop)
            _, (q, k, v) = step.ops.normed_linear(x[within], self.norm, self.params.eps, [self.q, self.k, self.v])
            mixed = []
            for segment, rows in block:
                for part in segment.parts(rows):
                    if part.start > rows.start:
                        yield type(self).__name__
                    own = slice(part.start - within.start, part.stop - within.start)
                    cos, sin, cache = step.cos[part], step.sin[part], _cache(segment, layer)
                    mixed.append(step.ops.attention(q[own], k[own], v[own], cos, sin, self.params, cache))
            out.append(step.ops.linear_onto(x[within], _joined(mixed), self.o))
        return _joined(out)


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Gated delta-net."""

    norm: F32  # [H]
    qkv: Matrix
    z: Matrix
    b: Matrix
    a: Matrix
    out: Matrix
    params: DeltaNetParams
    step: DeltaNetStep

    def forward(self, x: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Advance the state of each sequence: [T, H] -> [T, H], with rests between blocks of rows."""
        if step.batch.decodes:
            segments = step.batch.segments
            y = self.step(x, [_state(s, layer) for s in segments])
            for segment in segments:
                segment.states.mark(_state(segment, layer), segment.states.length + 1)
            return y
        out: list[F32] = []
        for block in step.batch.blocks():
            if out:
                yield type(self).__name__
            within = slice(block[0][1].start, block[-1][1].stop)
            projections = [self.qkv, self.z, self.b, self.a]
            _, (u, z, b, a) = step.ops.normed_linear(x[within], self.norm, self.params.eps, projections)
            mixed = []
            for segment, rows in block:
                state = _state(segment, layer)
                for start, end in pairwise(segment.cuts(rows)):
                    own = slice(start - within.start, end - within.start)
                    mixed.append(step.ops.delta_net(u[own], z[own], b[own], a[own], self.params, state))
                    segment.states.mark(state, segment.states.length + end - segment.start)
            out.append(step.ops.linear_onto(x[within], _joined(mixed), self.out))
        return _joined(out)


@dataclass(frozen=True, slots=True)
class SwiGlu:
    """down(silu(gate h) * up h)."""

    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """An MLP that every row goes through."""

    norm: F32  # [H]
    eps: float
    inner: SwiGlu

    def forward(self, x: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Compute x + mlp(norm(x)), in one piece."""
        yield from ()
        h = step.ops.rms_norm(x, self.norm, self.eps)
        return x + step.ops.swiglu(h, self.inner.gate, self.inner.up, self.inner.down)


@dataclass(frozen=True, slots=True)
class Moe:
    """Routed experts, and a shared expert behind a sigmoid gate if the model has one."""

    norm: F32  # [H]
    eps: float
    router: Matrix
    shared: SwiGlu | None
    shared_gate: Matrix | None
    renormalise: bool
    route: RouteStep

    def forward(self, x: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Compute x + experts(norm(x)), with a rest after each wave.

        Rows that lost an expert go into ``batch.failures``.

        Raises:
            MoestreamError: the source lost a routed pair without reporting a failure.
        """
        ops, k = step.ops, step.active
        h, ids, weights, gate = self.route(x, k) if step.router_override is None else self._imposed(x, layer, step)
        stream = step.experts.stream(layer, ids)  # submits every read; the shared expert is computed meanwhile
        if step.look_ahead is not None:
            step.look_ahead(x, layer)
        shared = None
        if self.shared is not None:
            shared = ops.swiglu(h, self.shared.gate, self.shared.up, self.shared.down)
        out = step.scratch.take(ids.size, h.shape[1])
        done = 0
        for wave in stream:
            ops.experts(h, wave, k, out)
            done += len(wave.pairs)
            if not step.batch.decodes:
                yield "wave"
        for pairs, error in stream.failures:
            out[pairs] = 0.0
            done += len(pairs)
            step.batch.failures.extend((int(row), error) for row in np.unique(np.asarray(pairs) // k))
        if done != ids.size:
            raise MoestreamError(f"layer {layer}: the expert store served {done} of {ids.size} routed pairs")
        return ops.combine(x, out, weights, shared, gate)

    def _imposed(self, x: F32, layer: int, step: Step) -> tuple[F32, I32, F32, F32 | None]:
        """As ``route``, with imposed ids, which get the weights that the router's logits give them."""
        assert step.router_override is not None
        gates = [self.router] if self.shared_gate is None else [self.router, self.shared_gate]
        h, (logits, *rest) = step.ops.normed_linear(x, self.norm, self.eps, gates)
        gate = rest[0] if rest else None
        imposed = step.router_override(layer, len(logits))
        if self.renormalise and len(logits) == 1:  # decoding: kept short
            order, weights = step.ops.route(logits[0][imposed], step.active, True)
            return h, imposed[0][order], weights, gate
        chosen = logits[np.arange(len(logits))[:, None], imposed]  # [T, k]
        among = chosen if self.renormalise else logits
        top = among.max(axis=1, keepdims=True)
        weights = np.exp(chosen - top) / np.exp(among - top).sum(axis=1, keepdims=True)
        return h, imposed, weights, gate


def _cache(segment: Segment, layer: int) -> KVCache:
    cache = segment.states.layers[layer]
    assert isinstance(cache, KVCache)
    return cache


def _state(segment: Segment, layer: int) -> DeltaState:
    state = segment.states.layers[layer]
    assert isinstance(state, DeltaState)
    return state


def _joined(rows: list[F32]) -> F32:
    return rows[0] if len(rows) == 1 else np.concatenate(rows)
