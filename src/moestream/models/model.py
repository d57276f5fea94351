"""The forward pass: embedding, layers, output head.

Shape letters: as in ``ops/base.py``; additionally N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

from moestream.errors import ConfigError
from moestream.models.batch import Batch
from moestream.models.blocks import ExpertSource, Mixer, Mlp, Moe, ReadAhead, RouterOverride, Scratch, Step
from moestream.models.config import ModelConfig
from moestream.models.embedding import Embedding
from moestream.models.states import SequenceStates
from moestream.ops.base import F32, I32, Matrix, Ops


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Norm weights already hold 1 + w where the model stores w."""

    mixer: Mixer
    mlp: Mlp


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything of a model but its routed experts."""

    embed: Embedding
    layers: tuple[Layer, ...]
    norm: F32  # [H]
    head: Matrix  # [V, H]


class Model:
    """A model ready to run. Not thread-safe: one forward pass at a time.

    Attributes:
        config: what the model is.
        active_experts: experts used per token; fewer than ``config.moe.active`` is lossy.
        observe: called with (layer, residual [T, H]) after each layer; for tests.
        router_override: imposes expert ids; for benchmarks that need a given routing.
        read_ahead: told what the next layer will probably choose; None: nothing is predicted.
        lend_for: told how many rows are under way as a pass begins; their working memory must be free when it returns.
        predict_override: imposes predictions, as ``router_override`` imposes what they predict; without it an imposed
            routing is not predicted.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        weights: Weights,
        experts: ExpertSource,
        active_experts: int | None = None,
    ) -> None:
        """Join the resident weights with a source of experts.

        Raises:
            ConfigError: more active experts than the model has.
        """
        self.config = config
        self.ops = ops
        self.experts = experts
        self.active_experts = config.moe.active if active_experts is None else active_experts
        if not 1 <= self.active_experts <= config.moe.experts:
            raise ConfigError(f"active_experts is {active_experts}, the model has {config.moe.experts} experts")
        self.observe: Callable[[int, F32], None] | None = None
        self.router_override: RouterOverride | None = None
        self.read_ahead: ReadAhead | None = None
        self.predict_override: RouterOverride | None = None
        self.lend_for: Callable[[int], None] | None = None
        self._weights = weights
        self._scratch: Scratch | None = None  # while no pass has it
        self._rows = 0  # of passes that run or rest
        pairs = np.arange(0, config.attention.rotary_dim, 2)
        self._frequencies = config.attention.rope_theta ** (-pairs / config.attention.rotary_dim)  # [R / 2]

    def new_states(self, limit: int | None = None) -> SequenceStates:
        """Empty states of a sequence planned for ``limit`` tokens."""
        return SequenceStates(self.config, self.ops.exact, limit)

    def forward(self, batch: Batch) -> F32:
        """Run the rows of a batch; logits [N, V] of ``batch.logits_rows``.

        Advances the states of every segment and appends unreadable experts to ``batch.failures``. Non-finite values
        spread within their sequence only, and are the caller's to find in the logits.
        """
        pieces = self.layers(batch)
        with np.errstate(all="ignore"):
            while True:
                try:
                    next(pieces)
                except StopIteration as end:
                    logits: F32 = end.value
                    return logits

    def layers(self, batch: Batch) -> Generator[str, bool | None, F32]:
        """The same piece by piece; yields the name of the next piece. Those of a name take about as long.

        ``send(True)`` puts the pass to rest, and yields the name again: batches of other sequences may run until
        ``next`` goes on or ``close`` ends it. What numpy has to say of non-finite values is the caller's to silence.
        """
        pieces = self._pieces(batch)
        while True:
            try:
                upcoming = next(pieces)
            except StopIteration as end:
                logits: F32 = end.value
                return logits
            if (yield upcoming):
                with self.experts.at_rest():
                    yield upcoming

    def _pieces(self, batch: Batch) -> Generator[str, None, F32]:
        for segment in batch.segments:
            segment.states.reserve(segment.length)
        scratch, self._scratch, rows = self._scratch or Scratch(), None, len(batch.ids)
        self._rows += rows
        try:
            scratch.fit(rows * self.active_experts)
            if self.lend_for is not None:
                self.lend_for(self._rows)
            x = yield from self._residual(batch, scratch)
        finally:
            self._scratch = scratch
            self._rows -= rows
        logits = self._logits(x, batch.logits_rows)
        for segment in batch.segments:
            segment.states.length += segment.length
        return logits

    def _residual(self, batch: Batch, scratch: Scratch) -> Generator[str, None, F32]:
        """The residual stream after the last layer [T, H]."""
        ops = self.ops
        angles = batch.positions[:, None] * self._frequencies  # [T, R / 2], float64: exact at any position
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        predictable = self.router_override is None or self.predict_override is not None
        look_ahead = self._look_ahead if self.read_ahead is not None and predictable else None
        step = Step(ops, self.experts, self.active_experts, self.router_override, batch, cos, sin, scratch, look_ahead)
        x = self._weights.embed(batch)
        rests = not batch.decodes
        for i, layer in enumerate(self._weights.layers):
            if rests and i:
                yield type(layer.mixer).__name__
            x = yield from layer.mixer.forward(x, i, step)
            if rests:
                yield "mlp"
            x = yield from layer.mlp.forward(x, i, step)
            if self.observe is not None:
                self.observe(i, x)
            if batch.on_layer is not None:
                batch.on_layer(i + 1, len(self._weights.layers))
        return x

    def _look_ahead(self, x: F32, layer: int) -> None:
        """Route the residual of ``layer`` [T, H] with the next layer's router: most of what that will choose."""
        assert self.read_ahead is not None
        if layer + 1 == len(self._weights.layers):
            return
        following = self._weights.layers[layer + 1]
        if not isinstance(following.mlp, Moe):
            return
        count = min(self.read_ahead.predictions(layer + 1, len(x)), self.active_experts)
        if count == 0:
            return
        ids = following.mlp.route(x, count)[1]
        if self.predict_override is not None:
            ids = self.predict_override(layer + 1, len(x))[:, :count]
        self.read_ahead.prefetch(layer + 1, ids)

    def _logits(self, x: F32, rows: I32) -> F32:
        """Logits of some rows: [T, H] -> [N, V]."""
        if not len(rows):
            return np.empty((0, self.config.vocab_size), np.float32)
        return self.ops.normed_linear(x[rows], self._weights.norm, self.config.eps, [self._weights.head])[1][0]
