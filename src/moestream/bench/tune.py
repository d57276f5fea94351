"""Finds the cache mode and size that decode fastest here, by trying them on the model's own routing.

The dense weights are loaded once; every candidate gets a store of its own, is filled at the disk's speed (popular
experts by replaying recorded routing), and then decodes for a few seconds. Arenas are tried by falling size,
then what uses the page cache, and the best once more in reverse, so that a disk that drifts does not choose.

Shape letters: T rows, k experts per row, E experts of a layer.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moestream import system
from moestream.bench.ceilings import LARGE, PROBE_THREADS, native, probe_file
from moestream.checkpoint.index import Checkpoint, open_checkpoint
from moestream.checkpoint.routing import SyntheticRouter
from moestream.config import CacheMode, RunConfig, format_size
from moestream.engine.load import Progress, Runtime, load_runtime, make_store
from moestream.engine.sampling import Sampler, SamplingParams
from moestream.errors import ConfigError
from moestream.experts.native_reader import make_reader
from moestream.models.batch import Batch
from moestream.models.registry import parse_config
from moestream.models.weights import WeightMap, map_weights
from moestream.ops.base import I32
from moestream.plan import MemoryPlan, plan_memory
from moestream.stored_plan import StoredPlan, machine_fingerprint, model_fingerprint
from moestream.text.tokenizer import Tokenizer

PROMPTS = (
    "Once upon a time a fox lived at the edge of a great forest. One winter morning it found",
    "def median(values: list[float]) -> float:\n    ",
    "Question: why is the sky blue in the day and red in the evening? Answer:",
    "The parliament met on Tuesday to discuss the new budget. The minister of finance said",
)
RECORD_SHARE, AGAIN_SHARE, DECODE_SHARE = 0.1, 0.25, 0.03
"""Of the whole time: for recording routing, for second turns, and for the decoding of one turn."""
FILL_SHARE = 0.35
"""Of the time left in a round: for filling the caches of one candidate, at most."""
PROBE_SECONDS = 0.3
SURVIVE, TIE = 0.75, 0.95
"""Second turns go to what reaches this share of the best; what reaches the larger one counts as equally fast."""
MOST_SURVIVORS = 4
MOST_TOKENS, FEWEST_TOKENS = 256, 3
REPLAYED = 96
"""Tokens of recorded routing that a new cache sees before it is timed."""
STRIPE = 32
"""Experts of a layer that are filled in at a time."""
RANDOM_PROMPT = 16
BUFFERED = ("hybrid", "page")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to cache experts."""

    cache: CacheMode
    slots: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A candidate, measured once."""

    tokens: int
    tok_s: float
    """Median over the tokens."""
    hit_rate: float
    bytes_per_token: float
    """That the slots did not hold."""
    cached_share: float
    """Of them, from the page cache."""
    filled: float
    """Share of what the caches could hold that was read in before the clock started."""
    disk: float
    """Bytes per second of direct reads, probed just before."""


def candidates(plan: MemoryPlan, floor: int, staging: int, available: int) -> list[Candidate]:
    """What to try, in this order: the later ones find what the earlier ones left in the page cache.

    Args:
        plan: the largest arena that the budget allows.
        floor: experts that one token touches; an LRU of fewer slots never hits.
        staging: slots of mode ``page``.
        available: bytes of free memory, of which ``hybrid`` leaves at least half to the page cache.
    """
    most = plan.slots
    arenas = {most, most * 3 // 4, most // 2} | ({floor} if floor < most * 2 // 5 else set())
    largest = min(most, available // 2 // plan.slot_nbytes)
    tried = [Candidate("arena", size) for size in sorted(arenas, reverse=True)]
    tried += [Candidate("page", staging), Candidate("hybrid", largest // 2), Candidate("hybrid", largest)]
    return [c for c in dict.fromkeys(tried) if c.slots >= plan.slots_minimum]


def choose(rates: dict[Candidate, float]) -> Candidate:
    """The fastest; of those about as fast, direct reads before buffered ones, then more slots.

    More slots, because a few seconds of decoding show less than a long conversation gains from them.
    """
    best = max(rates.values())
    close = [c for c, rate in rates.items() if rate >= TIE * best]
    order = ("page", "hybrid", "arena")
    return max(close, key=lambda c: (order.index(c.cache), c.slots))


def tune(
    folder: Path,
    run: RunConfig,
    seconds: float,
    routing: Literal["model", "calibrated", "uniform"],
    say: Callable[[str], None],
    progress: Progress = lambda what, done, total: None,
) -> StoredPlan:
    """Try cache modes and sizes on a model; stores nothing.

    Args:
        folder: The model.
        run: How it is run; ``ram`` bounds what is tried, ``cache`` is ignored.
        seconds: About how long, loading excluded.
        routing: Whose expert ids: the model's, or for random weights those of ``SyntheticRouter``.
        say: Called with each line for people.
        progress: Called with (what, done, total).

    Raises:
        ConfigError: the model has no experts to cache.
        BackendError: the native module is not installed.
        MoestreamError: the model cannot be run.
    """
    native()
    checkpoint = open_checkpoint(folder)
    config, names = parse_config(checkpoint.config)
    weights = map_weights(checkpoint, config, names)
    if not weights.experts:
        raise ConfigError(f"{folder} has no routed experts: there is nothing to measure")
    budget = run.ram or system.default_budget()
    loading = f"Loading {folder.name}"
    runtime = load_runtime(
        folder,
        replace(run, cache="page", max_batch=1),
        progress=lambda _what, done, total: progress(loading, done, total),
    )
    plan = _largest(weights, run, runtime, budget)
    tuner = _Tuner(checkpoint, weights, runtime, run, routing)
    try:
        floor = len(weights.experts) * runtime.model.active_experts
        tried = candidates(plan, floor, runtime.plan.slots, system.memory().available)
        with probe_file(checkpoint.files) as probed:
            results = _measure(tuner, tried, seconds, probed, say, progress)
    finally:
        tuner.runtime.close()
    rates = {c: statistics.mean(turn.tok_s for turn in turns) for c, turns in results.items()}
    best = choose(rates)
    return StoredPlan(
        cache=best.cache,
        slots=best.slots,
        ram=plan.fixed + (plan.borrowed if best.cache == "page" else 0) + best.slots * plan.slot_nbytes,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine_fingerprint(),
        model=model_fingerprint(folder),
        measured={
            "folder": str(folder.resolve()),
            "seconds": seconds,
            "budget": budget,
            "routing": routing,
            "exact": run.exact,
            "active_experts": runtime.model.active_experts,
            "floor_slots": floor,
            "slot_nbytes": plan.slot_nbytes,
            "candidates": [
                {**asdict(c), "tok_s": rates[c], "turns": [asdict(t) for t in turns]} for c, turns in results.items()
            ],
        },
    )


def _largest(weights: WeightMap, run: RunConfig, runtime: Runtime, budget: int) -> MemoryPlan:
    """The plan of the largest arena; the weights, loaded already, are not counted twice."""
    ops, loaded = runtime.model.ops, runtime.plan.dense
    plan = plan_memory(weights, runtime.config, replace(run, cache="arena", max_batch=1), ops, budget + loaded)
    return replace(plan, budget=budget, baseline=plan.baseline - loaded)


def _measure(
    tuner: _Tuner,
    tried: Sequence[Candidate],
    seconds: float,
    probed: Path,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[Candidate, list[Turn]]:
    """Both rounds; the turns of each candidate."""
    start = time.perf_counter()
    end = start + seconds

    def shown(what: str) -> None:
        progress(what, round(min(time.perf_counter() - start, seconds)), max(1, round(seconds)))

    shown("Recording routing")
    tuner.record(start + RECORD_SHARE * seconds)
    results: dict[Candidate, list[Turn]] = {}

    def turn(candidate: Candidate, until: float) -> None:
        tuner.tick = lambda: shown(f"Trying {candidate.cache}, {candidate.slots} slots")
        tuner.tick()
        disk = native().probe_read(str(probed), LARGE, PROBE_SECONDS, True, PROBE_THREADS)
        measured = tuner.turn(
            candidate, FILL_SHARE * max(1.0, until - time.perf_counter()), DECODE_SHARE * seconds, disk
        )
        results.setdefault(candidate, []).append(measured)
        say(turn_line(candidate, tuner.slot_nbytes, measured))

    for candidate in tried:
        turn(candidate, end - AGAIN_SHARE * seconds)
    best = max(turns[0].tok_s for turns in results.values())
    again = [c for c in reversed(tried) if results[c][0].tok_s >= SURVIVE * best][:MOST_SURVIVORS]
    for candidate in again:
        if end - time.perf_counter() > 2 * DECODE_SHARE * seconds:
            turn(candidate, end)
    return results


def turn_line(c: Candidate, slot_nbytes: int, t: Turn) -> str:
    """One turn for people."""
    size = format_size(c.slots * slot_nbytes)
    return (
        f"{c.cache:7}{size:>9}  {t.tok_s:6.2f} tok/s  {100 * t.hit_rate:5.1f} % in slots, "
        f"{format_size(t.bytes_per_token):>8} a token, {100 * t.cached_share:3.0f} % of it from the page cache; "
        f"{t.tokens} tokens, caches {100 * t.filled:.0f} % filled, disk {t.disk / 1e9:.2f} GB/s"
    )


class _Tuner:
    """A loaded model whose expert store is exchanged, and the conversation it carries on."""

    def __init__(
        self, checkpoint: Checkpoint, weights: WeightMap, runtime: Runtime, run: RunConfig, routing: str
    ) -> None:
        self.runtime = runtime
        self.slot_nbytes = runtime.plan.slot_nbytes
        self.tick: Callable[[], None] = lambda: None
        self._checkpoint = checkpoint
        self._weights = weights
        self._run = run
        self._prompts = deque(_prompts(checkpoint.path, runtime.config.vocab_size))
        moe = runtime.config.moe
        if routing != "model":
            router = SyntheticRouter(
                moe.experts, runtime.model.active_experts, len(runtime.config.layers), uniform=routing == "uniform"
            )
            runtime.model.router_override, runtime.model.predict_override = router.ids, router.predict
        self._routed: deque[tuple[int, I32]] = deque(maxlen=REPLAYED * len(weights.experts))
        random = np.random.default_rng(0)
        self._order = {layer: random.permutation(moe.experts).astype(np.int32) for layer in weights.experts}

    def record(self, until: float) -> None:
        """Read the prompts one after another, each with a few tokens of reply; at least one."""
        self._swap(Candidate("arena", len(self._weights.experts) * self.runtime.model.active_experts))
        while self._prompts:
            self._start(self._prompts[0])
            for _ in range(FEWEST_TOKENS):
                self._step()
            self._prompts.rotate(-1)
            if time.perf_counter() > until:
                break

    def turn(self, candidate: Candidate, fill_seconds: float, decode_seconds: float, disk: float) -> Turn:
        """Fill a candidate's caches, then decode."""
        self._swap(candidate)
        filled = self._fill(candidate, time.perf_counter() + fill_seconds)
        store, times = self.runtime.store, list[float]()
        self._step()  # what the conversation itself needs now
        before, until = store.stats(), time.perf_counter() + decode_seconds
        while len(times) < FEWEST_TOKENS or (len(times) < MOST_TOKENS and time.perf_counter() < until):
            self.tick()
            began = time.perf_counter()
            self._step()
            times.append(time.perf_counter() - began)
        io = store.stats() - before
        moved = io.bytes_read + io.bytes_cached
        return Turn(
            tokens=len(times),
            tok_s=1 / statistics.median(times),
            hit_rate=io.hit_rate,
            bytes_per_token=moved / len(times),
            cached_share=io.bytes_cached / moved if moved else 0.0,
            filled=filled,
            disk=disk,
        )

    def _swap(self, candidate: Candidate) -> None:
        """A new, empty store. Its memory is taken when it is written, and the old one's is given back before that."""
        old = self.runtime
        old.close()
        reader = make_reader(self._run.io_threads)
        store = make_store(self._checkpoint, self._weights, old.config, candidate.slots, candidate.cache, reader)
        store.on_route = lambda layer, ids: self._routed.append((layer, ids.copy()))
        old.model.experts = store
        old.model.read_ahead = None if self._run.prefetch == "off" else store
        old.model.lend_for = None  # these prompts are short
        self.runtime = replace(old, store=store, reader=reader)

    def _fill(self, candidate: Candidate, until: float) -> float:
        """Read experts until the caches are full or time is up, then replay; returns the share that was read."""
        store, tables = self.runtime.store, self._weights.experts
        store.on_route, hook = None, store.on_route
        expert = max(table.layout.nbytes for table in tables.values())
        count = candidate.slots if candidate.cache != "page" else 0
        if candidate.cache in BUFFERED:
            count += system.memory().available // expert
        each = min(self.runtime.config.moe.experts, -(-count // len(tables)))
        done = 0
        for at in range(0, each, STRIPE):
            for layer in tables:
                if time.perf_counter() < until:
                    ids = self._order[layer][at : min(at + STRIPE, each)]
                    self._drain(layer, ids[None, :])
                    done += len(ids)
        for layer, ids in list(self._routed):
            if time.perf_counter() < until:
                self._drain(layer, ids)
        store.on_route = hook
        return done / (each * len(tables))

    def _drain(self, layer: int, ids: I32) -> None:
        """Stream ids [T, k] of a layer without computing anything."""
        self.tick()
        stream = self.runtime.store.stream(layer, ids)
        for _ in stream:
            pass
        if stream.failures:
            raise stream.failures[0][1]

    def _start(self, prompt: list[int]) -> None:
        """Begin a conversation."""
        self._sampler = Sampler(SamplingParams(temperature=0.8, top_p=0.95, seed=0), prompt)
        self._reply: list[int] = []
        self._states = self.runtime.model.new_states()
        self._step(prompt)

    def _step(self, ids: list[int] | None = None) -> None:
        """Read a prompt, or decode one token; a full context starts the next conversation."""
        if ids is None and self._states.length >= self.runtime.plan.context:
            self._prompts.rotate(-1)
            self._start(self._prompts[0])
            return
        batch = Batch.of([(ids or self._reply[-1:], self._states)])
        logits = self.runtime.model.forward(batch)
        if batch.failures:
            raise batch.failures[0][1]
        self._reply.append(self._sampler.sample(logits[0], self._reply).token)


def _prompts(folder: Path, vocabulary: int) -> list[list[int]]:
    """Token ids of the built-in prompts, or random ones where the model has no tokenizer."""
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
        return [tokenizer.encode(text) for text in PROMPTS]
    random = np.random.default_rng(0)
    return [random.integers(0, vocabulary, RANDOM_PROMPT).tolist() for _ in PROMPTS]


def measured_lines(plan: StoredPlan) -> list[str]:
    """A stored plan for people: the choice, and every candidate beside it."""
    tried = plan.measured.get("candidates", [])
    slot: Any = plan.measured.get("slot_nbytes", 0)
    rows = [f"measured  {plan.day}: {plan.cache}, {plan.slots} slots ({format_size(plan.slots * slot)})"]
    for c in tried:
        mark = "*" if (c["cache"], c["slots"]) == (plan.cache, plan.slots) else " "
        hit = statistics.mean(t["hit_rate"] for t in c["turns"])
        rows.append(
            f"        {mark} {c['cache']:7}{format_size(c['slots'] * slot):>9}  {c['tok_s']:6.2f} tok/s, "
            f"{100 * hit:.1f} % in slots, {len(c['turns'])} x timed"
        )
    return rows
