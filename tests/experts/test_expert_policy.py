"""LFRU against a naive model, and against what is known about caches."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestream.experts.policy import LFRU, LRU, NO_SLOT, Request, belady, simulate

LAYERS, EXPERTS = 3, 6
LAYER_OF = [layer for layer in range(LAYERS) for _ in range(EXPERTS)]


@st.composite
def requests(draw):
    layer = draw(st.integers(0, LAYERS - 1))
    keys = draw(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True))
    counts = draw(st.lists(st.integers(1, 9), min_size=len(keys), max_size=len(keys)))
    return Request(layer, [layer * EXPERTS + k for k in keys], counts, max(counts) + draw(st.integers(0, 4)))


traces = st.lists(requests(), max_size=60)
capacities = st.integers(1, LAYERS * EXPERTS + 2)


class NaiveLFRU(LFRU):
    """The same estimate; victims found by looking at every key."""

    def _victim(self):
        best = []
        for layer in range(LAYERS):
            keys = [k for k in range(len(self.slot_of)) if self._layer_of[k] == layer]
            free = [(self._score[k], k) for k in keys if self.slot_of[k] != NO_SLOT and not self.pinned[k]]
            if free:
                score, key = min(free)
                best.append((score / self._total[layer], layer, key))
        return min(best)[2] if best else None

    def _evict(self, key):
        self._kept -= 1
        self._free.append(self.slot_of[key])
        self.slot_of[key] = NO_SLOT


class Watched(LFRU):
    """Checks the table after every change."""

    def acquire(self, key, force=False):
        pinned = {k for k in range(len(self.slot_of)) if self.pinned[k]}
        slot = super().acquire(key, force)
        assert all(self.slot_of[k] != NO_SLOT for k in pinned), "a pinned key was evicted"
        if slot is None:
            assert not force or len(pinned) == self.capacity
        else:
            assert 0 <= slot < self.capacity
            assert self.slot_of[key] == slot
        self.check()
        return slot

    def release(self, keys):
        super().release(keys)
        self.check()
        resident = [k for k, slot in enumerate(self.slot_of) if slot != NO_SLOT]
        if not any(self.pinned):
            assert len(resident) <= self.capacity - self.reserve

    def check(self):
        held = [slot for slot in self.slot_of if slot != NO_SLOT]
        assert len(set(held)) == len(held)
        assert len(held) + self.free() == self.capacity


@given(traces, capacities, st.integers(0, 5), st.sampled_from([0.5, 4.0, 64.0]))
def test_the_table_is_always_consistent(trace, capacity, reserve, half_life):
    simulate(Watched(capacity, LAYER_OF, reserve, half_life), trace)


@given(traces, capacities, st.integers(0, 5), st.sampled_from([0.5, 4.0, 64.0]))
def test_lfru_equals_the_naive_model(trace, capacity, reserve, half_life):
    fast = LFRU(capacity, LAYER_OF, reserve, half_life)
    naive = NaiveLFRU(capacity, LAYER_OF, reserve, half_life)
    for request in trace:
        assert simulate(fast, [request]) == simulate(naive, [request])
        assert [s != NO_SLOT for s in fast.slot_of] == [s != NO_SLOT for s in naive.slot_of]


@given(traces, capacities)
def test_lru_equals_an_ordered_dict(trace, capacity):
    trace = [Request(r.layer, r.keys[:capacity], r.counts[:capacity], r.rows) for r in trace]
    resident: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in trace:
        wanted = [k for k in request.keys if k in resident]
        hits += len(wanted)
        for key in sorted(request.keys):  # of keys asked for together, the lowest goes first
            resident.pop(key, None)
            resident[key] = None
        while len(resident) > capacity:
            resident.popitem(last=False)
    assert simulate(LRU(capacity, LAYER_OF), trace).hits == hits


@given(traces, capacities)
@settings(max_examples=200)
def test_nothing_beats_belady(trace, capacity):
    best = belady(trace, capacity)
    for policy in (LFRU(capacity, LAYER_OF), LFRU(capacity, LAYER_OF, reserve=1), LRU(capacity, LAYER_OF)):
        replay = simulate(policy, trace)
        assert replay.requests == best.requests
        assert replay.hits <= best.hits


@given(traces, capacities)
def test_keeping_nothing_never_hits(trace, capacity):
    policy = LRU(capacity, LAYER_OF, reserve=capacity)
    assert simulate(policy, trace).hits == 0
    assert policy.free() == capacity


@given(traces)
def test_a_cache_that_holds_everything_misses_each_key_once(trace):
    distinct = {key for request in trace for key in request.keys}
    replay = simulate(LFRU(LAYERS * EXPERTS, LAYER_OF), trace)
    assert replay.requests - replay.hits == len(distinct)


def test_the_estimate_is_the_decayed_frequency_of_use():
    half_life = 8.0
    policy = LFRU(4, LAYER_OF, half_life=half_life)
    rng = np.random.default_rng(0)
    used = rng.random(5000) < 0.3
    for hit in used:
        policy.record(0, [2] if hit else [3], [1], 1)
    weights = 2.0 ** -(np.arange(len(used))[::-1] / half_life)
    assert policy.probability(2) == pytest.approx((weights * used).sum() / weights.sum())
    assert policy.probability(2) + policy.probability(3) == pytest.approx(1.0)
    assert policy.probability(EXPERTS) == 0.0  # a layer that never ran


def test_keys_of_a_layer_that_never_ran_go_first():
    """What was read ahead for a layer whose turn never came."""
    policy = LFRU(3, LAYER_OF)
    for key in (0, EXPERTS):
        policy.acquire(key)
        if key == 0:
            policy.record(0, [0], [1], 1)
        policy.release([key])
    policy.acquire(1)
    policy.record(0, [1], [1], 1)
    assert policy.acquire(2) is None  # no more probable than what it would cost
    policy.record(0, [2], [1], 1)
    assert policy.acquire(2) is not None
    assert policy.slot_of[EXPERTS] == NO_SLOT
    assert NO_SLOT not in (policy.slot_of[0], policy.slot_of[1])


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (4, 2), (64, 8), (10**9, 8)])
def test_a_step_counts_as_the_root_of_its_rows_and_at_most_a_half_life(rows, tokens):
    policy = LFRU(4, LAYER_OF, half_life=8.0)
    for _ in range(200):
        policy.record(0, [0], [1], 1)
    policy.record(0, [1], [rows], rows)
    past = 2.0 ** (-tokens / 8.0) / (1.0 - 2.0 ** (-1.0 / 8.0))
    assert policy.probability(1) == pytest.approx(tokens / (tokens + past))
    assert policy.probability(0) + policy.probability(1) == pytest.approx(1.0)


def cyclic(sweeps, per_request=EXPERTS):
    return [
        Request(layer, list(range(layer * EXPERTS, layer * EXPERTS + per_request)), [1] * per_request, 1)
        for _ in range(sweeps)
        for layer in range(LAYERS)
    ]


@pytest.mark.parametrize("capacity", [6, 9, 12])
def test_below_the_working_set_lru_hits_nothing_and_lfru_what_fits(capacity):
    trace = cyclic(sweeps=40)
    assert simulate(LRU(capacity, LAYER_OF), trace).hits == 0
    hits = simulate(LFRU(capacity, LAYER_OF), trace).hits
    assert hits >= 0.8 * capacity * 39
    assert hits <= belady(trace, capacity).hits


def zipf_trace(tokens, rng):
    """Skewed popularity that drifts: 8 of 64 experts per layer and token."""
    logits = rng.normal(0, 1.0, (LAYERS, 64))
    drift = rng.normal(0, 1.0, (LAYERS, 64))
    trace = []
    for _ in range(tokens):
        drift = 0.95 * drift + 0.3 * rng.normal(0, 1.0, drift.shape)
        for layer in range(LAYERS):
            noisy = logits[layer] + drift[layer] + 0.7 * rng.gumbel(size=64)
            keys = np.sort(np.argpartition(-noisy, 8)[:8]) + 64 * layer
            trace.append(Request(layer, keys.tolist(), [1] * 8, 1))
    return trace


@pytest.mark.parametrize(("capacity", "margin"), [(16, 0.1), (48, 0.0), (96, 0.0)])
def test_on_drifting_popularity_lfru_is_at_least_as_good_as_lru(capacity, margin):
    trace = zipf_trace(300, np.random.default_rng(3))
    layer_of = [layer for layer in range(LAYERS) for _ in range(64)]
    lru = simulate(LRU(capacity, layer_of), trace).hit_rate
    lfru = simulate(LFRU(capacity, layer_of), trace).hit_rate
    assert lru + margin <= lfru <= belady(trace, capacity).hit_rate
