"""Expert ids for several requests at a time, on random weights: what they share and what is their own.

One request alone routes as ``checkpoint/routing.py`` says. Of several, a share of a layer's experts are as popular
with one as with the other, and the rest have another popularity with each. 1 is right for requests about the same
things. In the trained model of this package, requests about different things agree about half as much: their choices
overlap beyond chance 0.47 times as much as those of one request at distant tokens (8 prompts, 140 tokens each: 0.178
across, 0.210 within, 0.150 by chance). Popularities move over time.

``python benchmarks/serving_routing.py`` compares the distinct experts a layer is asked for with those that others
counted in trained models (``PUBLISHED``). Within a request the fit holds: 27.7 and 72.2 for 4 and 16 tokens, where 26.6
to 28.4 and 69.4 were counted. Across requests the counts stand for shares from 0.1 to a little above 1: about 1 for one
kind of prompt in three models and 0.15 to 0.25 in a fourth, 0.1 to 0.65 for mixed prompts. So 1 is assumed of requests
about one thing, and 0.5 of strangers.

Shape letters: R rows, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.routing import CHUNK, RECALL, ZIPF_EXPONENT, draw, drift, rarity
from moestream.models.batch import Batch
from moestream.models.model import Model
from moestream.models.states import SequenceStates
from moestream.ops.base import F32

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Count:
    """Mean distinct experts of a layer in a step that others published."""

    source: str
    what: str
    experts: int
    k: int
    requests: int
    rows: int
    """Of each request: more than one where the model verifies guesses of its own."""
    distinct: float


FLASH, GEMMA, NEMOTRON = "Qwen3.8-Flash-Next", "Gemma-4-26B-A4B", "Nemotron-3.5-Lightning-30B-A3B"
LAB = "aiueo52/flash-next-rtxpro6000: docs/lab-notes/MOE_SMALLM_SPEC.md"
TESTS = "fractalyze/sglang: experiments/gemma4-nvfp4-5090/BASELINE.md"
WIKI = "pjordanandrsn/grouped-nf4-gemm: kernel/RESULTS-k22-gptoss-mxfp4-b16.md"
AIME = "lucaspirola/FreeToken: benchmarks/results/nemotron35_lightning_5080_cache_study_2026-09-04.md"
PUBLISHED = (  # repositories on github.com; each with what ran
    Count(LAB, FLASH, 512, 10, 1, 4, 28.4),
    Count(LAB, FLASH, 512, 10, 1, 16, 69.4),
    Count("jschmied/qwen38-flash-next-gb10: notes/speed-of-light.md", FLASH, 512, 10, 1, 4, 26.6),
    Count("the same", f"{FLASH}, essays and an agent", 512, 10, 4, 4, 82.5),
    Count("bkvargyas/r9700-stack: PROGRESS.md", f"{FLASH}, code (66 to 71)", 512, 10, 4, 4, 68.5),
    Count("the same; 3.4 of the 4 ran", f"{FLASH}, code, prose, JSON, mathematics", 512, 10, 4, 4, 86.0),
    Count(TESTS, f"{GEMMA}, test prompts", 128, 8, 8, 1, 42.7),
    Count(TESTS, f"{GEMMA}, a corpus", 128, 8, 8, 1, 34.1),
    Count(TESTS, f"{GEMMA}, a corpus", 128, 8, 32, 1, 62.4),
    Count(WIKI, "gpt-oss-20b, Wikipedia", 32, 4, 16, 1, 18.2),
    Count(AIME, f"{NEMOTRON}, mathematics", 128, 6, 2, 1, 11.6),
    Count(AIME, f"{NEMOTRON}, mathematics", 128, 6, 8, 1, 38.5),
    Count(AIME, f"{NEMOTRON}, mathematics", 128, 6, 16, 1, 61.5),
)


def distinct(experts: int, k: int, requests: int, rows: int, shared: float, steps: int = 1000) -> float:
    """Mean distinct experts of a layer in a step with ``rows`` tokens of each request."""
    random, total = np.random.default_rng([experts, k, requests, rows]), 0
    for _ in range(steps):
        weight = rarity(experts, ZIPF_EXPONENT, random)
        private = random.permutation(experts)[round(shared * experts) :]
        seen = np.zeros(experts, bool)
        for _ in range(requests):
            own = weight.copy()
            own[private] = own[private][random.permutation(len(private))]
            seen[draw(own, rows, k, random)] = True
        total += int(seen.sum())
    return total / steps


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
        self._weight = np.stack(
            [rarity(moe.experts, ZIPF_EXPONENT, np.random.default_rng([seed, i])) for i in range(layers)]
        )
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
        weight = self._weight[layer].copy()
        weight[self._private] = weight[self._private][request.order]
        return draw(weight, rows, self._k, self._random)

    def _drift(self, tokens: int) -> None:
        before, self._tokens = self._tokens, self._tokens + tokens
        for _ in range(before // CHUNK, self._tokens // CHUNK):
            for weight in self._weight:
                drift(weight, self._random)


def main() -> None:
    """Print what others counted beside what is drawn here, then what is drawn for the shapes benchmarks use."""
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    print(
        "requests x tokens, experts top k: counted | by uniform routing | drawn with a share of 0, 0.25, 0.5, 0.75, 1"
    )
    for c in PUBLISHED:
        uniform = c.experts * (1 - (1 - c.k / c.experts) ** (c.requests * c.rows))
        drawn = " ".join(f"{distinct(c.experts, c.k, c.requests, c.rows, s):.1f}" for s in shares)
        print(
            f"{c.requests:2} x {c.rows:2}, {c.experts} top {c.k}: {c.distinct:.1f} | {uniform:.1f} | {drawn}  {c.what}"
        )
    for experts, k in ((512, 10), (128, 8)):
        for requests in (1, 2, 4, 8, 16):
            drawn = " ".join(f"{distinct(experts, k, requests, 1, s):.1f}" for s in shares)
            print(f"{requests:2} x  1, {experts} top {k}: {drawn}")


if __name__ == "__main__":
    main()
