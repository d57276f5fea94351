"""A store that gives slots up, and takes them again, while experts stream."""

from __future__ import annotations

import random

import numpy as np
import psutil
import pytest
from streamed import check_idle, check_slots
from test_expert_store import EXPERTS, LAYERS, consume, disk, make, router  # noqa: F401

from moestream.experts.arena import Arena
from moestream.experts.policy import LFRU, NO_SLOT
from moestream.experts.resident import ResidentStream

ALL = 3 * EXPERTS


@pytest.mark.parametrize("mode", ["arena", "hybrid"])
@pytest.mark.parametrize("slots", [8, ALL])
def test_every_wave_holds_the_files_bytes_whatever_the_size(disk, reader, mode, slots):  # noqa: F811
    store = make(disk, reader, slots, mode)
    rng = np.random.default_rng(slots)
    for _ in range(60):
        store.slots = int(rng.integers(1, slots + 1))
        for layer in LAYERS:
            ids = router(rng, int(rng.integers(1, 4)), k=3)
            if rng.random() < 0.5:
                store.prefetch(layer, ids)
            consume(disk, store.stream(layer, ids), layer, ids)
            check_idle(store)
        store.resize()
        assert store.policy.capacity == store.slots
        assert len({s for s in store.policy.slot_of if s != NO_SLOT}) <= store.slots


def test_a_sweep_at_rest_keeps_what_it_has_not_used(disk, reader, monkeypatch):  # noqa: F811
    """And the size is reached once it has."""
    monkeypatch.setattr("moestream.experts.stream.SWEEP_WAVE", 1)
    monkeypatch.setattr("moestream.experts.store.LANDING_SLOTS", 2)
    store = make(disk, reader, 12)
    rng, ids = np.random.default_rng(0), router(np.random.default_rng(1), 40, k=3)
    stream = store.stream(0, ids)
    rest = consume_some(stream, 2)
    with store.at_rest():
        held = [key for key in range(EXPERTS) if store.policy.pinned[key]]
        store.slots = 2
        other = router(rng, 1, k=2)
        consume(disk, store.stream(2, other), 2, other)
        assert all(store.policy.slot_of[key] != NO_SLOT for key in held)
        assert 2 <= store.policy.capacity <= 2 * len(held) + 2  # each may lie among the last
    rest += consume_some(stream, ALL)
    assert sorted(rest) == sorted(np.unique(ids))
    again = router(rng, 1, k=2)
    consume(disk, store.stream(3, again), 3, again)
    assert store.policy.capacity == 2
    check_idle(store)


def consume_some(stream, most):
    served = []
    for _, wave in zip(range(most), stream, strict=False):
        served += wave.experts.tolist()
    return served


def test_a_model_that_fitted_streams_when_it_no_longer_does(disk, reader):  # noqa: F811
    store = make(disk, reader, ALL)
    ids = np.array([[4, 1, 2]], np.int32)
    for layer in LAYERS:
        consume(disk, store.stream(layer, ids), layer, ids)
    assert isinstance(store.stream(0, ids), ResidentStream)
    store.slots = 5
    for layer in (*LAYERS, *LAYERS):
        consume(disk, store.stream(layer, ids), layer, ids)
    assert store.stats().misses > 3 * len(LAYERS)
    store.slots = ALL
    for layer in (*LAYERS, *LAYERS):
        consume(disk, store.stream(layer, ids), layer, ids)
    before = store.stats()
    for layer in LAYERS:
        consume(disk, store.stream(layer, ids), layer, ids)
    assert (store.stats() - before).bytes_read == 0
    check_slots(store)


def test_more_slots_than_experts_may_go_too(disk, reader):  # noqa: F811
    store = make(disk, reader, ALL + 9)
    everything = np.arange(EXPERTS, dtype=np.int32)[None]
    for slots in (ALL + 9, ALL + 2, ALL, ALL + 9):
        store.slots = slots
        for layer in (*LAYERS, *LAYERS):
            consume(disk, store.stream(layer, everything), layer, everything)
    assert store.stats().misses == ALL
    check_slots(store)


def test_what_is_lent_comes_back(disk, reader):  # noqa: F811
    store = make(disk, reader, 12)
    rng, sizes = np.random.default_rng(0), []
    for lent in (0, 5, 2, 100, 0):  # half stays, whatever is asked for
        store.lend(lent)
        sizes.append(store.policy.capacity)
        for layer in LAYERS:
            ids = router(rng, 2, k=3)
            consume(disk, store.stream(layer, ids), layer, ids)
        assert store.slots == 12
    assert sizes == [12, 7, 10, 6, 12]
    store.slots = 8
    store.lend(2)
    assert store.policy.capacity == store.usable == 6
    check_idle(store)


def test_the_size_outlives_a_reset(disk, reader):  # noqa: F811
    store = make(disk, reader, 8)
    ids = np.array([[4, 1, 2]], np.int32)
    store.slots = 4
    consume(disk, store.stream(0, ids), 0, ids)
    store.reset()
    consume(disk, store.stream(0, ids), 0, ids)
    assert store.policy.capacity == 4


@pytest.mark.parametrize("seed", range(5))
def test_the_least_probable_go_first_and_slots_come_back(seed):
    rng = random.Random(seed)
    policy = LFRU(20, [0] * 30)
    for key in range(20):
        assert policy.acquire(key) is not None
    policy.release(range(20))
    for _ in range(200):
        policy.record(0, [min(int(rng.expovariate(0.2)), 19)], [1], 1)
    policy.pin(19)
    ranked = sorted(range(19), key=policy.probability, reverse=True)
    slot_of = list(policy.slot_of)
    given_up, moves = policy.resize(8)
    kept = {key for key in range(20) if policy.slot_of[key] != NO_SLOT}
    assert kept == {*ranked[:7], 19}
    assert len(given_up) == 11  # one is pinned among the last
    where = dict(moves)
    assert len(where) == len(moves)
    for key in kept:
        assert policy.slot_of[key] == where.get(slot_of[key], slot_of[key])
    held = {policy.slot_of[key] for key in kept}
    assert len(held) == 8
    assert held.isdisjoint(given_up)
    assert held - {slot_of[19]} <= set(range(8))  # what is pinned stays where it is
    policy.release([19])
    assert policy.resize(8) == ([19], [(19, min(set(range(8)) - held))])
    for key in kept:
        policy.pin(key)
    assert policy.resize(3) == ([], [])
    assert policy.capacity == 8
    assert policy.resize(20) == ([], [])
    assert policy.free() == 12


def test_memory_goes_back_to_the_system_and_other_slots_keep_their_bytes():
    arena = Arena(40, (1 << 20) + 5000)  # no multiple of a huge page
    process, nbytes = psutil.Process(), arena.slot_nbytes
    slots = arena.memory.reshape(40, nbytes)
    slots[:] = np.arange(40, dtype=np.uint8)[:, None]
    before = process.memory_info().rss
    arena.move([(38, 3), (39, 7)])
    gone = [*range(20, 40), 1]
    arena.discard(reversed(gone))
    assert before - process.memory_info().rss > 0.9 * len(gone) * nbytes
    expected = [*range(20)]
    expected[3], expected[7] = 38, 39
    kept = [i for i in range(20) if i != 1]
    assert (slots[kept] == np.array(expected, np.uint8)[kept][:, None]).all()
    slots[gone] = 99
    assert (slots[kept] == np.array(expected, np.uint8)[kept][:, None]).all()


def test_what_is_given_up_lies_together(disk, reader):  # noqa: F811
    """Or huge pages would keep most of it."""
    store = make(disk, reader, 12)
    rng = np.random.default_rng(0)
    for slots in (12, 7, 9, 4, 12, 5):
        store.slots = slots
        for layer in LAYERS:
            ids = router(rng, 2, k=3)
            consume(disk, store.stream(layer, ids), layer, ids)
        assert store.policy.capacity == slots
        assert max(store.policy.slot_of) < slots
