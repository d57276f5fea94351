"""What single techniques and lossy choices do to decoding, interleaved in one process.

Ablation: computing in order of arrival against waiting for all reads of a layer; LFRU against LRU; reading ahead of the
router or not (``auto``: as shipped, off where it does not pay), forced with guesses of the next layer's router whose
recall is set by --recall (``early``), or with the experts of the last token (``temporal``).
Claims: temporal prediction -18 %, early routing -38 %, fewer active experts (2.6x from 10 to 4).

Random weights route at random, so calibrated synthetic routing is imposed. Every variant decodes the same trace; the
segments of a round alternate between variants, each after some tokens that are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np

from moestream import LLM
from moestream.checkpoint.index import open_checkpoint
from moestream.checkpoint.routing import RECALL, SyntheticRouter
from moestream.engine.load import Runtime
from moestream.experts.governor import Governor
from moestream.experts.native_reader import make_reader
from moestream.experts.policy import LRU, landing_slots
from moestream.experts.store import ExpertStore
from moestream.experts.stream import ExpertStream
from moestream.models.blocks import ReadAhead
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights
from moestream.ops.base import I32, Wave

POLL_SECONDS = 5e-5


class Routing:
    """A synthetic trace, and two ways to guess at it."""

    def __init__(self, experts: int, k: int, layers: int, recall: float) -> None:
        self._router = SyntheticRouter(experts, k, layers, seed=1, recall=recall)
        self._last: dict[int, I32] = {}
        self.early = self._router.predict

    def ids(self, layer: int, rows: int) -> I32:
        """What the router chooses."""
        self._last[layer] = self._router.ids(layer, rows)
        return self._last[layer]

    def temporal(self, layer: int, rows: int) -> I32:
        """The experts of the last token; after a step of other rows, any."""
        last = self._last.get(layer)
        return self._router.predict(layer, rows) if last is None or len(last) != rows else last


class AlwaysAhead:
    """In the governor's place: reads ahead whether it pays or not."""

    on = True

    def step_ended(self, seconds: float) -> None:
        """Nothing is learned."""


class WaitForAll:
    """An expert source that yields nothing before every submitted read of the layer has landed."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store

    def stream(self, layer: int, ids: I32) -> _Waiting:
        """Submit as the store does."""
        return _Waiting(self._store, self._store.stream(layer, ids))


@dataclass
class _Waiting:
    store: ExpertStore
    stream: ExpertStream

    @property
    def failures(self) -> Sequence[Any]:
        return self.stream.failures

    def __iter__(self) -> Iterator[Wave]:
        while self.store.reader.outstanding():
            time.sleep(POLL_SECONDS)
        return iter(self.stream)


class LruStore(ExpertStore):
    """The store with plain LRU in place of LFRU, and the same slots for bytes on their way."""

    def _make_policy(self) -> LRU:
        return LRU(self.arena.slots, self._layer_of_key, landing_slots(self.arena.slots, len(self._layer_of_key)))


def second_store(runtime: Runtime, kind: type[ExpertStore]) -> ExpertStore:
    """Another store over the same checkpoint, with as many slots and a reader of its own."""
    checkpoint = open_checkpoint(runtime.folder)
    config, names = parse_config(checkpoint.config)
    tables = map_weights(checkpoint, config, names).experts
    ordered = [tables.get(layer) for layer in range(len(config.layers))]
    return kind(ordered, checkpoint.files, runtime.plan.slots, "arena", make_reader(8))


class Bench:
    """One loaded model whose variants are switched between segments."""

    def __init__(self, llm: LLM, recall: float, warm: int, tokens: int) -> None:
        self.llm = llm
        self.model = llm.runtime.model
        self.store = llm.runtime.store
        self.ahead: ReadAhead | None = self.model.read_ahead
        self.recall = recall
        self.warm, self.tokens = warm, tokens
        self.traces: dict[str, Routing] = {}
        self.facts: dict[str, list[dict[str, float]]] = {}

    def variant(
        self,
        name: str,
        k: int | None = None,
        source: Any = None,
        store: ExpertStore | None = None,
        ahead: str | None = None,
        governor: Governor | AlwaysAhead | None = None,
        trace: str = "common",
    ) -> Callable[[], float]:
        """A variant to interleave: tok/s of one segment."""
        config = self.llm.runtime.config
        active = k or config.moe.active
        held = store or self.store
        self.facts[name] = []

        def run() -> float:
            key = f"{trace} {active}"
            if key not in self.traces:
                self.traces[key] = Routing(config.moe.experts, active, len(config.layers), self.recall)
            routing = self.traces[key]
            self.model.experts = source or held
            self.model.active_experts = active
            self.model.router_override = routing.ids
            self.model.read_ahead = None if ahead is None else self.ahead
            self.model.predict_override = None if ahead is None else getattr(routing, ahead)
            if governor is not None:
                held.governor = governor  # type: ignore[assignment]
            return self._segment(name, held)

        return run

    def _segment(self, name: str, store: ExpertStore) -> float:
        stream = self.llm.stream([1], max_tokens=self.warm + self.tokens + 2, temperature=0, ignore_eos=True)
        for _ in range(self.warm + 1):
            next(stream)
        before, start = store.stats(), time.perf_counter()
        for _ in range(self.tokens):
            next(stream)
        took, stats = time.perf_counter() - start, store.stats() - before
        stream.close()
        fact = {"MB_a_token": stats.bytes_read, "ahead_MB": stats.bytes_ahead, "wasted_MB": stats.bytes_wasted}
        mean = {key: nbytes / self.tokens / 1e6 for key, nbytes in fact.items()}
        self.facts[name].append({**mean, "hit_rate": stats.hit_rate})
        return self.tokens / took


def variants(bench: Bench, names: Sequence[str]) -> dict[str, Callable[[], float]]:
    """The variants asked for."""
    made: dict[str, Callable[[], float]] = {}
    for name in names:
        if name.startswith("experts-"):
            k = int(name.removeprefix("experts-"))
            made[name] = bench.variant(name, k=k)
        elif name == "base":
            made[name] = bench.variant(name)
        elif name == "wait-for-all":
            made[name] = bench.variant(name, source=WaitForAll(bench.store))
        elif name == "lru":
            made[name] = bench.variant(name, store=second_store(bench.llm.runtime, LruStore), trace="lru")
        elif name == "auto":
            made[name] = bench.variant(name, ahead="early", governor=Governor())
        elif name in ("early", "temporal"):
            made[name] = bench.variant(name, ahead=name, governor=AlwaysAhead())
        else:
            raise SystemExit(f"no variant {name!r}: base, wait-for-all, lru, auto, early, temporal, experts-K")
    return made


def main() -> None:
    """Load, settle, interleave, report."""
    parser = common.arguments(__doc__, 4)
    parser.add_argument("model", type=Path, help="folder of `moestream bench --synthetic qwen3.5-397b --layers 8`")
    parser.add_argument("--ram", default="5GB", help="budget (default %(default)s); lru needs its slots a second time")
    parser.add_argument("--variants", nargs="+", default=["base", "wait-for-all", "lru", "auto", "early", "temporal"])
    parser.add_argument("--recall", type=float, default=RECALL, help="of the early guesses (default %(default)s)")
    parser.add_argument("--settle", type=int, default=150, help="tokens decoded before anything (default %(default)s)")
    parser.add_argument("--warm", type=int, default=12, help="uncounted tokens of a segment (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="counted tokens of a segment (default %(default)s)")
    args = parser.parse_args()
    file = common.largest_file(args.model)
    with LLM.load(args.model, ram=args.ram, cache="arena", context=2048, max_batch=1) as llm:
        bench = Bench(llm, args.recall, args.warm, args.tokens)
        made = variants(bench, args.variants)
        bench.tokens = args.settle
        for run in dict.fromkeys([made[args.variants[0]], *([made["lru"]] if "lru" in made else [])]):
            run()
        for facts in bench.facts.values():
            facts.clear()
        bench.tokens = args.tokens
        before = common.disk_rate(file), common.memory_rate()
        results = common.interleave(made, args.rounds)
        after = common.disk_rate(file), common.memory_rate()
    disk, memory = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    print(f"ceilings: disk {disk / common.GB:.2f} GB/s, memory {memory / common.GB:.1f} GB/s")
    print("\n".join(common.table(results, args.variants[0], "tok/s")))
    report: dict[str, Any] = {"disk_GB_s": disk / common.GB, "memory_GB_s": memory / common.GB, "variants": {}}
    for name, facts in bench.facts.items():
        mean = {key: float(np.mean([fact[key] for fact in facts])) for key in facts[0]}
        ceiling = disk / 1e6 / max(mean["MB_a_token"], 1e-9)
        print(
            f"  {name}: {mean['MB_a_token']:.0f} MB a token (the disk alone would give {ceiling:.1f} tok/s), of them "
            f"{mean['ahead_MB']:.0f} ahead and used, {mean['wasted_MB']:.0f} for nothing; the cache hits "
            f"{100 * mean['hit_rate']:.1f} %"
        )
        ratio = common.paired(results, name, args.variants[0])
        report["variants"][name] = {"tok_s": common.medians(results)[name], "ratio": ratio, **mean}
    common.report("single techniques in decoding", report)


if __name__ == "__main__":
    main()
