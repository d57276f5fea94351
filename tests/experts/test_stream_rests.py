"""A pass at rest: others stream meanwhile, and it goes on where it was; nothing is read twice, lost or overwritten."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from expert_disk import FaultyReader, fail_ranges
from test_expert_store import EXPERTS, LAYERS, MODES, check_bytes, check_idle, consume, disk, make, router  # noqa: F401
from test_read_ahead import Cancels, drain, settle

from moestream.experts.policy import NO_SLOT, SWEEP_ROWS

ALL = 3 * EXPERTS
ROWS = 2 * SWEEP_ROWS


def set_wave(monkeypatch, experts):
    """Sweeps come in waves of at most so many."""
    monkeypatch.setattr("moestream.experts.stream.SWEEP_WAVE", experts)
    monkeypatch.setattr("moestream.experts.stream.LONGEST_WAVE", experts)


class Resting:
    """A stream whose pass rests after every wave, while ``inner`` runs."""

    def __init__(self, store, stream, inner):
        self.store, self.stream, self.inner = store, stream, inner

    @property
    def failures(self):
        return self.stream.failures

    def __iter__(self):
        for wave in self.stream:
            yield wave
            with self.store.at_rest():
                self.inner()


def decode(disk, store, rng, rows=1, predict=False):  # noqa: F811
    """A step of another pass, all layers."""
    for at, layer in enumerate(LAYERS):
        ids = router(rng, rows, 3)
        stream = store.stream(layer, ids)
        if predict and at + 1 < len(LAYERS):
            store.prefetch(LAYERS[at + 1], router(rng, rows, 3))
        consume(disk, stream, layer, ids)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 12, ALL])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("wave", [1, 8])
def test_a_sweep_with_a_step_of_others_in_every_rest(disk, reader, mode, slots, shuffle, wave, monkeypatch):  # noqa: F811
    set_wave(monkeypatch, wave)
    monkeypatch.setattr("moestream.experts.store.LANDING_SLOTS", min(slots, 4))  # else guesses never survive here
    bad = {tuple(disk.tables[layer].ranges[e, part, :2].tolist()) for layer, e, part in [(0, 1, 0), (2, 5, 1)]}
    faulty = FaultyReader(reader, fail_ranges(bad), shuffle=shuffle, seed=slots)
    store = make(disk, faulty, slots, mode)
    rng = np.random.default_rng(slots)
    lost = {0: {1}, 2: {5}, 3: set()}
    for step in range(3):
        for at, layer in enumerate(LAYERS):
            ids = router(rng, rows=ROWS, k=(3, EXPERTS, 1)[step])
            stream = store.stream(layer, ids)
            if at + 1 < len(LAYERS):
                store.prefetch(LAYERS[at + 1], router(rng, ROWS, 5))
            asked = set(np.unique(ids).tolist())
            resting = Resting(store, stream, lambda: decode(disk, store, rng, rows=2, predict=True))
            served = consume(disk, resting, layer, ids)
            assert set(served) == asked - lost[layer]
            with store.at_rest():  # between two layers
                decode(disk, store, rng)
    store.claim([])
    drain(store)
    check_idle(store)


def read_keys(store, monkeypatch):
    """Keys in the order in which they are read."""
    keys, submit = [], store._flight.submit
    monkeypatch.setattr(store._flight, "submit", lambda new, *rest: (keys.extend(new), submit(new, *rest)))
    return keys


def test_nothing_is_read_or_counted_twice(disk, reader, monkeypatch):  # noqa: F811
    """Not even what both passes want, on its way or landed before the rest, nor what was read ahead for one."""
    monkeypatch.setattr("moestream.experts.store.LANDING_SLOTS", 1)
    set_wave(monkeypatch, 1)
    store = make(disk, reader, slots=ALL)
    keys = read_keys(store, monkeypatch)
    rng = np.random.default_rng(0)
    everything = np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1))
    asked = 0
    for at, layer in enumerate(LAYERS):
        stream = store.stream(layer, everything)
        if at + 1 < len(LAYERS):
            store.prefetch(LAYERS[at + 1], everything)
        asked += EXPERTS
        for wave in stream:
            check_bytes(disk, wave)
            with store.at_rest():
                decode(disk, store, rng)
            asked += 3 * len(LAYERS)
    stats = store.stats()
    assert sorted(keys) == list(range(ALL))
    assert stats.hits + stats.hits_ahead + stats.misses == asked
    assert stats.hits_ahead > 0
    assert stats.bytes_wasted == 0
    check_idle(store)


class Slow(FaultyReader):
    """Reports nothing, failures neither, until it is asked to wait for long."""

    def wait(self, min_count, timeout):
        return super().wait(min_count, timeout) if timeout > 0 else ([], [])


def test_what_both_wait_for_is_read_once_and_fails_both(disk, reader, monkeypatch):  # noqa: F811
    bad = {tuple(disk.tables[0].ranges[4, 0, :2].tolist())}
    store = make(disk, Slow(reader, fail_ranges(bad, errno.EACCES)), slots=EXPERTS + 4)
    keys = read_keys(store, monkeypatch)
    warm = np.array([[0]], np.int32)
    consume(disk, store.stream(0, warm), 0, warm)
    sweep = np.tile(np.array([0, 2, 4, 6], np.int32), (ROWS, 1))
    stream = store.stream(0, sweep)
    assert next(stream).experts.tolist() == [0]
    ids = np.array([[4, 6, 1]], np.int32)
    with store.at_rest():
        inner = store.stream(0, ids)
        assert set(consume(disk, inner, 0, ids)) == {1, 6}
        assert [pairs.tolist() for pairs, _ in inner.failures] == [[0]]
        slot = store.policy.slot_of[6]
        assert slot != NO_SLOT
        assert store.policy.pinned[6] == 1  # the sweep's, which has not used it
    assert sorted(wave.experts.tolist() for wave in stream) in ([[2, 6]], [[2], [6]])
    assert [pairs.tolist() for pairs, _ in stream.failures] == [[4 * row + 2 for row in range(ROWS)]]
    assert sorted(keys) == [0, 1, 2, 4, 6]
    assert store.stats().failed == 1
    check_idle(store)


def test_what_another_brought_is_not_read_again(disk, reader, monkeypatch):  # noqa: F811
    """An expert that had no slot before the rest, and one that another pass only guessed."""
    store = make(disk, reader, slots=4, mode="arena")
    sweep = np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1))
    stream = store.stream(0, sweep)
    next(stream)
    waiting = [store._turn.stream._keys[i] for i in store._turn.stream._pending]
    assert waiting
    keys = read_keys(store, monkeypatch)
    with store.at_rest():
        ids = np.array([[waiting[-1]]], np.int32)
        consume(disk, store.stream(0, ids), 0, ids)
        held = store.policy.slot_of[waiting[-1]] != NO_SLOT
    consumed = [e for wave in stream for e in wave.experts.tolist()]
    assert len(set(consumed)) == len(consumed)
    assert keys.count(waiting[-1]) == 2 - held
    check_idle(store)


def test_a_guess_that_is_dropped_serves_a_stream_that_waits_for_it(disk, reader, monkeypatch):  # noqa: F811
    """Its read was cancelled when the other pass ended, and that is not reported yet when the stream goes on."""
    set_wave(monkeypatch, 1)
    store = make(disk, Cancels(reader), slots=4, mode="none")
    ids = np.tile(np.arange(EXPERTS, dtype=np.int32), (2, 1))
    stream = store.stream(0, ids)
    served = next(stream).experts.tolist()
    pending = [stream._keys[i] for i in stream._pending]
    with store.at_rest():
        store.prefetch(0, np.array([pending], np.int32))
        assert store._turn.ahead
    served += [e for wave in stream for e in wave.experts.tolist()]
    assert sorted(served) == list(range(EXPERTS))
    assert stream.failures == []
    drain(store)
    check_idle(store)


def test_what_is_read_ahead_for_a_sweep_waits_for_it(disk, reader, monkeypatch):  # noqa: F811
    monkeypatch.setattr("moestream.experts.store.LANDING_SLOTS", 4)
    store = make(disk, reader, slots=16)
    sweep = np.tile(np.array([0, 1], np.int32), (ROWS, 1))
    list(store.stream(0, sweep))
    guess = np.tile(np.array([3, 4, 5], np.int32), (ROWS, 1))
    store.prefetch(2, guess)
    settle(store)
    with store.at_rest():
        ids = np.array([[3, 6]], np.int32)  # one of them is wanted here, too
        consume(disk, store.stream(2, ids), 2, ids)
        consume(disk, store.stream(3, ids), 3, ids)
    before = store.stats()
    stream = store.stream(2, guess)
    consume(disk, stream, 2, guess)
    after = store.stats() - before
    assert (after.hits, after.hits_ahead, after.misses) == (1, 2, 0)
    check_idle(store)


def test_others_find_slots_whatever_a_sweep_holds(disk, reader):  # noqa: F811
    """What was read ahead for it gives way if it left nobody a slot."""
    store = make(disk, reader, slots=EXPERTS, mode="none")
    list(store.stream(0, np.zeros((ROWS, 1), np.int32)))
    store.prefetch(2, np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1)))
    settle(store)
    assert store.policy.free() == 0
    rng = np.random.default_rng(0)
    with store.at_rest():
        decode(disk, store, rng)
    check_idle(store)


def test_a_sweep_at_rest_leaves_others_their_landing_slots(disk, reader, monkeypatch):  # noqa: F811
    monkeypatch.setattr("moestream.experts.policy.SWEEP_LANDING_SLOTS", 4)
    monkeypatch.setattr("moestream.experts.policy.LANDING_SLOTS", 4)
    set_wave(monkeypatch, 1)
    store = make(disk, reader, slots=16)
    for layer in LAYERS:
        ids = np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1))
        list(store.stream(layer, ids))  # the cache is full
    stream = store.stream(0, ids)
    next(stream)
    with store.at_rest():
        store.stream(0, np.zeros((1, 0), np.int32)).close()
        assert store.policy.free() >= 4
    list(stream)
    check_idle(store)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("running", [False, True])
def test_a_pass_cancelled_at_rest_gives_everything_back(disk, reader, monkeypatch, after, running):  # noqa: F811
    set_wave(monkeypatch, 1)
    monkeypatch.setattr("moestream.experts.store.LANDING_SLOTS", 1)
    store = make(disk, reader, slots=8)
    ids = np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1))
    stream = store.stream(0, ids)
    for _ in range(after):
        next(stream)
    store.prefetch(2, ids)
    rest = store.at_rest()
    rest.__enter__()
    own = np.array([[0, 4, 6]], np.int32)
    other = store.stream(0, own) if running else None
    assert not rest.__exit__(GeneratorExit, GeneratorExit(), None)
    if other is not None:
        consume(disk, other, 0, own)
    with pytest.raises(RuntimeError, match="layer 0 was closed before its end"):
        next(stream)
    drain(store)
    check_idle(store)
    consume(disk, store.stream(2, ids), 2, ids)
    check_idle(store)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("slots", [1, 3, 8, ALL])
def test_a_sweep_survives_that_another_pass_fails(disk, reader, monkeypatch, slots, after):  # noqa: F811
    """An exception leaves the stream of the other anywhere; after a reset the sweep reads again what it needs."""
    set_wave(monkeypatch, 1)
    store = make(disk, reader, slots)
    ids = np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1))
    stream = store.stream(0, ids)
    served = [next(stream).experts.tolist() for _ in range(after)]
    store.prefetch(2, ids)
    with store.at_rest():
        other = store.stream(0, ids[:1])
        next(other)
        store.prefetch(2, ids[:1])
        store.reset()
        check_idle(store)
        rng = np.random.default_rng(0)
        decode(disk, store, rng)
    for wave in stream:
        check_bytes(disk, wave)
        served.append(wave.experts.tolist())
    assert sorted(e for wave in served for e in wave) == list(range(EXPERTS))
    with pytest.raises(RuntimeError, match="closed before its end"):
        next(other)
    check_idle(store)


def test_a_stream_left_behind_in_a_rest_ends_with_it(disk, reader):  # noqa: F811
    store = make(disk, reader, slots=4)
    ids = np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1))
    stream = store.stream(0, ids)
    served = next(stream).experts.tolist()
    with store.at_rest():
        left = store.stream(2, ids[:1])
        next(left)
        store.prefetch(3, ids[:1])
    served += [e for wave in stream for e in wave.experts.tolist()]
    assert sorted(served) == list(range(EXPERTS))
    with pytest.raises(RuntimeError, match="layer 2 was closed before its end"):
        next(left)
    drain(store)
    check_idle(store)


def test_only_one_pass_rests(disk, reader):  # noqa: F811
    store = make(disk, reader)
    with store.at_rest(), pytest.raises(RuntimeError, match="a pass is at rest already"), store.at_rest():
        pass
    store.close()


def test_closing_ends_a_stream_at_rest(disk, reader):  # noqa: F811
    store = make(disk, reader, slots=4)
    ids = np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1))
    next(store.stream(0, ids))
    rest = store.at_rest()
    rest.__enter__()
    next(store.stream(2, ids))
    store.close()
    assert reader.outstanding() == 0


class Order(FaultyReader):
    """Reads nothing until told to wait, then in the order that a reader promises."""

    def __init__(self, inner):
        super().__init__(inner)
        self.demand, self.prefetch, self.order = [], [], []

    def submit(self, ranges, prefetch=False):
        (self.prefetch if prefetch else self.demand).extend(ranges.tolist())

    def promote(self, tickets):
        first = [row for row in self.prefetch if row[4] in set(tickets)]
        self.prefetch = [row for row in self.prefetch if row[4] not in set(tickets)]
        self.demand = first + self.demand

    def wait(self, min_count, timeout):
        if timeout == 0.0:
            return [], []
        queue = self.demand or self.prefetch
        ticket = queue[0][4]
        rows = np.array([row for row in queue if row[4] == ticket], np.int64)
        queue[:] = [row for row in queue if row[4] != ticket]
        self.order.append(ticket)
        self.inner.submit(rows)
        return self.inner.wait(1, 10.0)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_whoever_runs_while_a_sweep_rests_reads_first(disk, reader, rows):  # noqa: F811
    """Also what the sweep is already reading for itself; and replies that take a short prompt along."""
    faulty = Order(reader)
    store = make(disk, faulty, slots=ALL)
    store.policy.reserve = 0
    sweep = np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1))
    stream = store.stream(0, sweep)  # tickets 0 to 6
    assert next(stream).experts.tolist() == [0]
    with store.at_rest():
        ids = np.tile(np.array([5, 1], np.int32), (rows, 1))
        consume(disk, store.stream(0, ids), 0, ids)
        ids = np.tile(np.array([2], np.int32), (rows, 1))
        consume(disk, store.stream(3, ids), 3, ids)  # ticket 7
    assert sorted(faulty.order[:3]) == [0, 1, 5]
    assert faulty.order[3] == 7
    assert sorted(e for wave in stream for e in wave.experts.tolist()) == [1, 2, 3, 4, 5, 6]
    check_idle(store)


def test_steps_are_told_apart(disk, reader, monkeypatch):  # noqa: F811
    """A step in a rest neither ends the sweep's nor is judged: it shared the disk."""
    store = make(disk, reader, slots=8)
    judged = []
    monkeypatch.setattr(store.governor, "step_ended", judged.append)
    rng = np.random.default_rng(0)
    sweep = np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1))
    for layer in LAYERS:
        for _ in Resting(store, store.stream(layer, sweep), lambda: decode(disk, store, rng)):
            assert store.policy.reserve == store._reserve(ROWS)
    assert judged == []
    decode(disk, store, rng)
    decode(disk, store, rng)
    assert len(judged) == 1  # the first of these two
    few = np.tile(np.arange(EXPERTS, dtype=np.int32), (2, 1))
    now = [0.0]
    monkeypatch.setattr("moestream.experts.store.time.perf_counter", lambda: now[0])
    for layer in LAYERS:
        for _ in Resting(store, store.stream(layer, few), lambda: now.__setitem__(0, now[0] + 100.0)):
            now[0] += 1.0
    judged.clear()
    waves = now[0] % 100.0
    decode(disk, store, rng)
    assert judged == [waves]


def test_time_at_rest_is_no_streams(disk, reader, monkeypatch):  # noqa: F811
    store = make(disk, reader, slots=4)
    now = [0.0]
    monkeypatch.setattr("moestream.experts.store.time.perf_counter", lambda: now[0])
    ids = np.array([[0, 1, 2]], np.int32)
    stream = store.stream(0, ids)
    next(stream)
    now[0] = 1.0
    with store.at_rest():
        now[0] = 50.0
        inner = store.stream(2, ids)
        now[0] = 52.0
        list(inner)
        now[0] = 100.0
    now[0] = 104.0
    assert store.stats().stream_seconds == 1.0 + 2.0 + 4.0
    list(stream)
    assert store.stats().stream_seconds == 1.0 + 2.0 + 4.0
