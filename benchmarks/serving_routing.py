"""Expert ids for several requests at a time, on random weights: what they share and what is their own.

One request alone routes as ``checkpoint/routing.py`` says. Of several, a share of a layer's experts are as popular
with one as with the other, and the rest have another popularity with each. 1 is right for requests about the same
things. In the trained model of this package, requests about different things agree about half as much: their choices
overlap beyond chance 0.47 times as much as those of one request at distant tokens (8 prompts, 140 tokens each: 0.178
across, 0.210 within, 0.150 by chance). Popularities move over time.

Shape letters: R rows, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.routing import CHUNK, LIFETIME, RECALL, ZIPF_EXPONENT
from moestream.models.batch import Batch
from moestream.models.model import Model
from moestream.models.states import SequenceStates
from moestream.ops.base import F32

I32 = npt.NDArray[np.int32]


@dataclass(slots=True)
class _Request:
    order: npt.NDArray[np.intp]
    """How it rearranges the popularities of what is not shared."""
    ready: dict[int, I32]
    """By layer: rows foreseen but not yet taken."""


class RequestRouter:
    """Imposes a routing on a model that runs batches of several requests."""

    def __init__(self, model: Model, shared: float, seed: int = 0) -> None:
        """Replace the model's router and what is foreseen of it; the cost of computing both stays.

        Args:
            model: What is to be routed.
            shared: Share of a layer's experts that are as popular with one request as with another.
            seed: The same seed gives the same popularities.
        """
        moe, layers = model.config.moe, len(model.config.layers)
        self._k = model.active_experts
        self._random = np.random.default_rng([seed, 7])
        self._weight = np.stack(  # [layers, E], 1 / popularity
            [(np.random.default_rng([seed, i]).permutation(moe.experts) + 1.0) ** ZIPF_EXPONENT for i in range(layers)]
        ).astype(np.float32)
        self._private = self._random.permutation(moe.experts)[round(shared * moe.experts) :]
        self._requests: WeakKeyDictionary[SequenceStates, _Request] = WeakKeyDictionary()
        self._tokens = 0
        self._batch: Batch | None = None
        self._run = model.layers
        model.layers = self.layers  # type: ignore[method-assign]
        model.router_override, model.predict_override = self.ids, self.predict

    def layers(self, batch: Batch) -> Generator[str, bool | None, F32]:
        """The model's pass; where it rests other batches may run."""
        self._drift(max(s.length for s in batch.segments))
        pieces, rest = self._run(batch), None
        while True:
            self._batch = batch
            try:
                upcoming = pieces.send(rest)
            except StopIteration as end:
                logits: F32 = end.value
                return logits
            rest = yield upcoming

    def ids(self, layer: int, rows: int) -> I32:
        """The experts of the batch's rows in a layer [R, k]."""
        return self._rows(layer, rows, take=True)

    def predict(self, layer: int, rows: int) -> I32:
        """What a predictor would say before [R, k]; the surest first, as ``SyntheticRouter.predict``.

        Wrong ids are experts that are popular now: in sweeps those of other tokens.
        """
        assert self._batch is not None
        true = self._rows(layer, rows, take=False)
        chance = 1.0 - (1.0 - RECALL) * (2 * np.arange(self._k) + 1) / self._k  # [k]
        parts = []
        for segment, start in ((s, s.start) for s in self._batch.segments):
            own = true[start : start + segment.length]
            alone = segment.length == 1
            parts.append(self._draw(self._requests[segment.states], layer, 1) if alone else np.roll(own, 1, axis=0))
        wrong = np.concatenate(parts)
        taken = (wrong[:, :, None] == true[:, None, :]).any(2)
        return np.where((self._random.random(true.shape) < chance) | taken, true, wrong).astype(np.int32)

    def _rows(self, layer: int, rows: int, take: bool) -> I32:
        assert self._batch is not None
        parts: list[I32] = []
        for segment in self._batch.segments:
            request = self._requests.get(segment.states)
            if request is None:
                request = self._requests[segment.states] = _Request(self._random.permutation(len(self._private)), {})
            ready = request.ready.get(layer, np.empty((0, self._k), np.int32))
            if len(ready) < segment.length:
                ready = np.concatenate([ready, self._draw(request, layer, segment.length - len(ready))])
            parts.append(ready[: segment.length])
            request.ready[layer] = ready[segment.length :] if take else ready
        ids = np.concatenate(parts)
        assert len(ids) == rows
        return ids

    def _draw(self, request: _Request, layer: int, rows: int) -> I32:
        """The k smallest of exponential waiting times are k draws without replacement."""
        weight = self._weight[layer].copy()
        weight[self._private] = weight[self._private][request.order]
        out = np.empty((rows, self._k), np.int32)
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            waits = self._random.standard_exponential((count, len(weight)), dtype=np.float32) * weight
            out[start : start + count] = np.argpartition(waits, self._k - 1, axis=1)[:, : self._k]
        return out

    def _drift(self, tokens: int) -> None:
        """Popularities change hands: each once in ``LIFETIME`` tokens on average."""
        before, self._tokens = self._tokens, self._tokens + tokens
        for _ in range(before // CHUNK, self._tokens // CHUNK):
            experts = self._weight.shape[1]
            for weight in self._weight:
                moved = self._random.permutation(experts)[: round(experts * CHUNK / LIFETIME)]
                weight[moved] = weight[np.roll(moved, 1)]
