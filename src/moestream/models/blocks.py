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
from moestream.models.batch import Batch
from moestream.ops.base import F32, I32, AttentionParams, DeltaNetParams, DeltaState, KVCache, Matrix, Ops, Wave

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
    """Memory for expert outputs, reused by all layers of a pass."""

    rows: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def take(self, rows: int, cols: int) -> F32:
        """Uninitialised [rows, cols], valid until the next call."""
        if self.rows.shape[0] < rows or self.rows.shape[1] != cols:
            self.rows = np.empty((rows, cols), np.float32)
        return self.rows[:rows]


class Mixer(Protocol):
    """Mixes the rows of each sequence: [T, H] -> [T, H], advancing the layer's states."""

    def forward(self, h: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Output to be added to the residual; yields where the pass may rest, as ``Model.layers``."""


class Mlp(Protocol):
    """Works on each row alone."""

    def forward(self, x: F32, h: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Residual x [T, H] plus the MLP of h [T, H] -> [T, H]; yields where the pass may rest, as ``Model.layers``."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal grouped-query attention."""

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    params: AttentionParams

    def forward(self, h: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Attend within each sequence: [T, H] -> [T, H], with rests between blocks of rows."""
        out: list[F32] = []
        for block in step.batch.blocks():
            if out:
                yield type(self).__name__
            first = block[0][1].start
            q, k, v = step.ops.linear(h[first : block[-1][1].stop], [self.q, self.k, self.v])
            mixed = []
            for segment, rows in block:
                cache = segment.states.layers[layer]
                assert isinstance(cache, KVCache)
                for part in segment.parts(rows):
                    if part.start > rows.start:
                        yield type(self).__name__
                    own = slice(part.start - first, part.stop - first)
                    cos, sin = step.cos[part], step.sin[part]
                    mixed.append(step.ops.attention(q[own], k[own], v[own], cos, sin, self.params, cache))
            out += step.ops.linear(_joined(mixed), [self.o])
        return _joined(out)


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Gated delta-net."""

    qkv: Matrix
    z: Matrix
    b: Matrix
    a: Matrix
    out: Matrix
    params: DeltaNetParams

    def forward(self, h: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Advance the state of each sequence: [T, H] -> [T, H], with rests between blocks of rows."""
        out: list[F32] = []
        for block in step.batch.blocks():
            if out:
                yield type(self).__name__
            first = block[0][1].start
            u, z, b, a = step.ops.linear(h[first : block[-1][1].stop], [self.qkv, self.z, self.b, self.a])
            mixed = []
            for segment, rows in block:
                state = segment.states.layers[layer]
                assert isinstance(state, DeltaState)
                for start, end in pairwise(segment.cuts(rows)):
                    own = slice(start - first, end - first)
                    mixed.append(step.ops.delta_net(u[own], z[own], b[own], a[own], self.params, state))
                    segment.states.mark(state, segment.states.length + end - segment.start)
            out += step.ops.linear(_joined(mixed), [self.out])
        return _joined(out)


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """SwiGLU."""

    gate: Matrix
    up: Matrix
    down: Matrix

    def forward(self, x: F32, h: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Compute x + mlp(h), in one piece."""
        yield from ()
        return x + step.ops.swiglu(h, self.gate, self.up, self.down)


@dataclass(frozen=True, slots=True)
class Moe:
    """Routed experts, and a shared expert behind a sigmoid gate if the model has one."""

    router: Matrix
    shared: DenseMlp | None
    shared_gate: Matrix | None
    renormalise: bool

    def forward(self, x: F32, h: F32, layer: int, step: Step) -> Generator[str, None, F32]:
        """Compute x + experts(h), with a rest after each wave; rows that lost an expert go into ``batch.failures``.

        Raises:
            MoestreamError: the source lost a routed pair without reporting a failure.
        """
        ops, k = step.ops, step.active
        gates = [self.router] if self.shared_gate is None else [self.router, self.shared_gate]
        logits, *shared_gate = ops.linear(h, gates)
        ids, weights = self._route(logits, layer, step)
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
            yield "wave"
        for pairs, error in stream.failures:
            out[pairs] = 0.0
            done += len(pairs)
            step.batch.failures.extend((int(row), error) for row in np.unique(np.asarray(pairs) // k))
        if done != ids.size:
            raise MoestreamError(f"layer {layer}: the expert store served {done} of {ids.size} routed pairs")
        return ops.combine(x, out, weights, shared, shared_gate[0] if shared_gate else None)

    def _route(self, logits: F32, layer: int, step: Step) -> tuple[I32, F32]:
        """Expert ids and weights [T, k]; imposed ids get the weights that the router's logits give them."""
        if step.router_override is None:
            return step.ops.route(logits, step.active, self.renormalise)
        imposed = step.router_override(layer, len(logits))
        if self.renormalise and len(logits) == 1:  # decoding: kept short
            order, weights = step.ops.route(logits[0][imposed], step.active, True)
            return imposed[0][order], weights
        chosen = logits[np.arange(len(logits))[:, None], imposed]  # [T, k]
        among = chosen if self.renormalise else logits
        top = among.max(axis=1, keepdims=True)
        weights = np.exp(chosen - top) / np.exp(among - top).sum(axis=1, keepdims=True)
        return imposed, weights


def _joined(rows: list[F32]) -> F32:
    return rows[0] if len(rows) == 1 else np.concatenate(rows)
