"""Claims: temporal prediction -18 % (25 % right), early routing 53 % right, the page cache hits 71 %.

Routing of the trained model inside the package while it reads its own texts, recorded at its routers:

* recall of three predictors: the experts of the last token (temporal); the next layer's router applied to this
  layer's hidden state before its experts (early), and the same with the next layer's norm weights;
* what a prefetch of the first few guesses would read, and how many of those bytes are used;
* of the experts that a cache does not hold, how many each predictor names: only those can gain time;
* hit rates of LRU, LFRU and Belady's optimum at shares of the experts, on this routing and on synthetic routing
  with 512 experts a layer calibrated to published hit rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import texts

from moestream import LLM
from moestream.checkpoint.routing import SyntheticRouter
from moestream.experts.policy import LFRU, LRU, NO_SLOT, Request, belady, simulate
from moestream.models.blocks import Moe
from moestream.ops.base import F32, I32, Matrix

SHARES = (1 / 32, 1 / 16, 1 / 8, 0.167, 1 / 4)
"""Of the experts of each layer: Flash-MoE's tables count 16, 32, 64 and 128 of 512; its 35 GB of cache hold 16.7 %."""


class Recorder:
    """Notes what every router sees and chooses while a model runs."""

    def __init__(self, llm: LLM) -> None:
        self.model = llm.runtime.model
        layers = self.model._weights.layers
        self.routers = [layer.mlp.router if isinstance(layer.mlp, Moe) else None for layer in layers]
        self.norms = [layer.mlp_norm for layer in layers]
        self.chosen: list[list[I32]] = [[] for _ in layers]  # [T, k] a text
        self.early: list[list[F32]] = [[] for _ in layers]  # logits [T, E] by the layer before
        self.renormed: list[list[F32]] = [[] for _ in layers]
        self.model.read_ahead = None  # it would route too
        ops = self.model.ops
        self._linear: Callable[[F32, Sequence[Matrix]], list[F32]] = ops.linear
        self._route: Callable[[F32, int, bool], tuple[I32, F32]] = ops.route
        ops.linear, ops.route = self.linear, self.route  # type: ignore[method-assign]
        self._layer = 0

    def linear(self, x: F32, matrices: Sequence[Matrix]) -> list[F32]:
        """As the model's; where it is a router, the next layer's router gets the same hidden state."""
        layer = next((i for i, router in enumerate(self.routers) if router is not None and router is matrices[0]), None)
        if layer is not None:
            self._layer = layer
            after = layer + 1
            if after < len(self.routers) and self.routers[after] is not None:
                self.early[after].append(self._linear(x, [self.routers[after]])[0])
                renormed = (x / self.norms[layer] * self.norms[after]).astype(np.float32)
                self.renormed[after].append(self._linear(renormed, [self.routers[after]])[0])
        return self._linear(x, matrices)

    def route(self, logits: F32, k: int, renormalise: bool) -> tuple[I32, F32]:
        """As the model's, noted."""
        ids, weights = self._route(logits, k, renormalise)
        self.chosen[self._layer].append(ids)
        return ids, weights


def top(logits: F32, count: int) -> I32:
    """The ``count`` likeliest experts of each row, likeliest first: [T, E] -> [T, count]."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :count].astype(np.int32)


def recall(guesses: npt.NDArray[np.integer], chosen: I32) -> float:
    """Share of the chosen experts that were guessed."""
    return float((chosen[:, :, None] == guesses[:, None, :]).any(axis=2).mean())


def prediction(chosen: list[I32], logits: list[F32] | None, counts: Sequence[int]) -> dict[int, float]:
    """Recall of the first n guesses; ``logits`` None: the experts of the token before, by weight."""
    found: dict[int, list[float]] = {n: [] for n in counts}
    for i, ids in enumerate(chosen):
        for n in counts:
            guesses, wanted = (ids[:-1, :n], ids[1:]) if logits is None else (top(logits[i], n), ids)
            found[n].append(recall(guesses, wanted))
    return {n: float(np.mean(values)) for n, values in found.items()}


def decode_trace(chosen: list[list[I32]], experts: int) -> list[Request]:
    """Requests of one token after another, layer by layer, as decoding makes them."""
    whole = [np.concatenate(layer) for layer in chosen]  # [T, k] each
    return [
        Request(layer, (ids[t] + layer * experts).tolist(), [1] * ids.shape[1], 1)
        for t in range(len(whole[0]))
        for layer, ids in enumerate(whole)
    ]


def hit_rates(chosen: list[list[I32]], experts: int) -> dict[str, dict[str, float]]:
    """Hit rates of each policy at each share."""
    trace = decode_trace(chosen, experts)
    layer_of = [layer for layer in range(len(chosen)) for _ in range(experts)]
    landing = chosen[0][0].shape[1]  # a newcomer stays only if it beats what it would replace
    rates = {}
    for share in SHARES:
        slots = max(1, round(share * len(layer_of)))
        rates[f"{100 * share:.1f} %"] = {
            "lru": simulate(LRU(slots, layer_of), trace).hit_rate,
            "admitting all": simulate(LFRU(slots, layer_of), trace).hit_rate,
            "lfru": simulate(LFRU(slots + landing, layer_of, landing), trace).hit_rate,
            "belady": belady(trace, slots).hit_rate,
        }
    return rates


def covered_misses(
    chosen: list[list[I32]], guesses: list[list[I32]] | None, experts: int, share: float
) -> dict[str, float]:
    """Of the experts LFRU does not hold, the share that a predictor names; and how much of what it reads is used.

    ``guesses`` None: the experts of the token before.
    """
    layer_of = [layer for layer in range(len(chosen)) for _ in range(experts)]
    policy = LFRU(max(1, round(share * len(layer_of))), layer_of)
    whole = [np.concatenate(layer) for layer in chosen]
    named = (
        None
        if guesses is None
        else [np.concatenate(layer) if layer else ids[:0] for layer, ids in zip(guesses, whole, strict=True)]
    )
    missed = found = read = 0
    for t in range(len(whole[0])):
        for layer, ids in enumerate(whole):
            guess = ids[t - 1 : t].reshape(-1) if named is None else named[layer][t : t + 1].reshape(-1)  # may be empty
            keys = (ids[t] + layer * experts).tolist()
            fetch = {k for g in guess if policy.slot_of[k := int(g) + layer * experts] == NO_SLOT}
            absent = {key for key in keys if policy.slot_of[key] == NO_SLOT}
            missed, found, read = missed + len(absent), found + len(absent & fetch), read + len(fetch)
            simulate(policy, [Request(layer, keys, [1] * len(keys), 1)])
    return {"covered": found / max(missed, 1), "used": found / max(read, 1), "misses": missed}


def synthetic(tokens: int, layers: int, k: int) -> list[list[I32]]:
    """Calibrated routing of a 512-expert model, ``k`` a token."""
    router = SyntheticRouter(512, k, layers, seed=1)
    return [[router.ids(layer, tokens)] for layer in range(layers)]


def main() -> None:
    """Recall, misses covered, hit rates; then the JSON line."""
    parser = common.arguments(__doc__, 1)
    parser.add_argument("--stories", type=int, default=12, help="stories read (default %(default)s)")
    parser.add_argument("--requests", type=int, default=20, help="tool conversations read (default %(default)s)")
    args = parser.parse_args()
    with LLM.load(ram="1GB", max_batch=1) as llm:
        read = texts.stories(llm, args.stories) + texts.tool_requests(llm, args.requests, unseen=False)[1]
        recorder = Recorder(llm)
        for text in read:
            llm.logits(text.ids)
        experts, k = llm.runtime.config.moe.experts, llm.runtime.config.moe.active
    chosen = recorder.chosen
    after = range(1, len(chosen))
    counts = (2, 4, k, 10)
    tokens = sum(len(text.ids) for text in read)
    print(f"{tokens} tokens, {len(chosen)} layers, {k} of {experts} experts; by chance {k / experts:.2f}")

    def over_layers(one: Callable[[int], dict[int, float]]) -> dict[int, float]:
        each = [one(layer) for layer in after]
        return {n: float(np.mean([values[n] for values in each])) for n in each[0]}

    recalls = {
        "temporal": over_layers(lambda layer: prediction(chosen[layer], None, counts[:-1])),
        "early": over_layers(lambda layer: prediction(chosen[layer], recorder.early[layer], counts)),
        "early, next norm": over_layers(lambda layer: prediction(chosen[layer], recorder.renormed[layer], counts)),
    }
    for name, values in recalls.items():
        print(f"  {name:17} recall " + ", ".join(f"first {n}: {100 * v:.0f} %" for n, v in values.items()))
    guesses = [[top(logits, k) for logits in layer] for layer in recorder.renormed]
    covered: dict[str, Any] = {}
    for share in (1 / 8, 1 / 4, 1 / 2):
        covered[f"{100 * share:.1f} %"] = case = {
            "temporal": covered_misses(chosen, None, experts, share),
            "early": covered_misses(chosen, guesses, experts, share),
        }
        for name, c in case.items():
            print(
                f"  LFRU of {100 * share:4.1f} %: {name} prefetch names {100 * c['covered']:.0f} % of {c['misses']} "
                f"misses; {100 * c['used']:.0f} % of what it reads is used"
            )
    rates = {f"this model, {k} of {experts}": hit_rates(chosen, experts)}
    for active in (10, 4):
        rates[f"calibrated, {active} of 512"] = hit_rates(synthetic(1500, 4, active), 512)
    for name, by_share in rates.items():
        print(f"hit rates, {name} a layer: LRU, LFRU that admits everything, LFRU, Belady")
        for share, r in by_share.items():
            print(f"  {share:>6} of the experts: " + ", ".join(f"{100 * rate:.1f} %" for rate in r.values()))
    common.report("prediction and hit rates", {"recall": recalls, "misses": covered, "hit_rates": rates})


if __name__ == "__main__":
    main()
