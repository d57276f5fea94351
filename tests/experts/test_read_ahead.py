"""Experts read before the router chose them: never a wrong byte, never in the way, never anybody's failure."""

from __future__ import annotations

import errno
import time

import numpy as np
import pytest
from expert_disk import FaultyReader, fail_ranges
from test_expert_store import EXPERTS, LAYERS, MODES, check_idle, consume, disk, make, router  # noqa: F401

from moestream.experts.governor import HOLD, TRIAL, Governor
from moestream.experts.policy import NO_SLOT
from moestream.experts.reader import TICKET, ReadFailure
from moestream.experts.store import READ_AHEAD

ALL = 3 * EXPERTS


def settle(store):
    """Let what is being read land, without telling the store."""
    reader = getattr(store.reader, "inner", store.reader)
    while reader.outstanding():
        time.sleep(0.001)


def drain(store):
    """Wait for wrong reads that were under way when their layer's turn came."""
    while store.reading_anything():
        store.wait()


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 12, ALL])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_predictions_right_or_wrong_change_no_byte(disk, reader, mode, slots, shuffle):  # noqa: F811
    faulty = FaultyReader(reader, shuffle=shuffle, seed=slots)
    store = make(disk, faulty, slots, mode)
    rng = np.random.default_rng(slots)
    for step in range(12):
        for at, layer in enumerate(LAYERS):
            ids = router(rng, rows=(1, 3)[step % 2], k=3)
            stream = store.stream(layer, ids)
            following = LAYERS[(at + 1) % len(LAYERS)]
            store.prefetch(following, router(rng, rows=(1, 3)[step % 2], k=(2, 5)[step % 2]))
            consume(disk, stream, layer, ids)
            if rng.random() < 0.5:
                store.read_ahead()
            if not shuffle and rng.random() < 0.5:
                settle(store)
    store.claim([])
    drain(store)
    check_idle(store)


def test_what_landed_is_a_hit_and_is_counted_apart(disk, reader):  # noqa: F811
    store = make(disk, reader, slots=16)
    ids = np.array([[2, 4, 6]], np.int32)
    list(store.stream(0, ids))
    before = store.stats()
    store.prefetch(2, np.array([[1, 3, 5]], np.int32))
    settle(store)
    wanted = np.array([[1, 3, 0]], np.int32)
    stream = store.stream(2, wanted)
    first = next(stream)
    assert first.experts.tolist() == [1, 3]
    assert [w.experts.tolist() for w in stream] == [[0]]
    account = store.stats() - before
    assert (account.hits, account.hits_ahead, account.misses) == (0, 2, 1)
    expert = sum(disk.tables[2].layout.part_nbytes)
    assert 2 * expert <= account.bytes_ahead < 3 * expert + (9 << 13)
    assert expert <= account.bytes_wasted < 2 * expert + (9 << 13)
    check_idle(store)
    assert (store.stats() - before).bytes_ahead == account.bytes_ahead


def slow(monkeypatch, reader):
    """Keep tickets in flight: the reader reports nothing until it is asked to wait for long."""
    real = reader.wait
    monkeypatch.setattr(reader, "wait", lambda n, timeout: real(n, timeout) if timeout > 0 else ([], []))


def test_what_is_on_its_way_is_promoted_and_awaited(disk, reader, monkeypatch):  # noqa: F811
    store = make(disk, reader, slots=16)
    promoted = []
    real = reader.promote
    monkeypatch.setattr(reader, "promote", lambda tickets: (promoted.extend(tickets), real(tickets)))
    slow(monkeypatch, reader)
    store.prefetch(0, np.array([[1, 3, 5]], np.int32))
    ids = np.array([[3, 1, 2]], np.int32)
    stream = store.stream(0, ids)
    assert len(promoted) == 2
    assert sorted(consume(disk, stream, 0, ids)) == [1, 2, 3]
    stats = store.stats()
    assert (stats.hits, stats.hits_ahead, stats.misses) == (0, 0, 3)
    assert 0 < stats.bytes_ahead < stats.bytes_read
    drain(store)
    check_idle(store)


class Cancels(FaultyReader):
    """Keeps prefetch reads queued for ever, and reports cancelled ones at the next long wait."""

    def __init__(self, inner):
        super().__init__(inner)
        self.queued: dict[int, list[int]] = {}
        self.cancelled: list[ReadFailure] = []

    def submit(self, ranges, prefetch=False):
        if prefetch:
            self.queued |= {row[4]: row for row in ranges.tolist()}
        else:
            super().submit(ranges)

    def cancel(self, tickets):
        rows = [self.queued.pop(ticket) for ticket in tickets]
        self.cancelled += [ReadFailure(row[4], errno.ECANCELED, row[0], row[1]) for row in rows]

    def wait(self, min_count, timeout):
        if timeout > 0:
            self._failed += self.cancelled
            self.cancelled = []
        return super().wait(min_count, timeout)


def test_a_cancelled_read_that_is_wanted_after_all_is_read_again(disk, reader):  # noqa: F811
    store = make(disk, Cancels(reader), slots=16)
    store.prefetch(0, np.array([[1, 3]], np.int32))
    other = np.array([[0]], np.int32)
    stream = store.stream(2, other)  # the prediction was wrong, its reads are cancelled and not yet reported
    ids = np.array([[3, 5]], np.int32)
    stream.close()
    stream = store.stream(0, ids)
    assert sorted(consume(disk, stream, 0, ids)) == [3, 5]
    drain(store)
    check_idle(store)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, 0])
def test_a_failed_read_ahead_is_nobodys_failure_until_it_is_wanted(disk, reader, code):  # noqa: F811
    bad = {tuple(disk.tables[2].ranges[e, 0, :2].tolist()) for e in (1, 4)}
    faulty = FaultyReader(reader, fail_ranges(bad, code))
    store = make(disk, faulty, slots=16)
    for wanted, lost in [([0, 2], set()), ([1, 2], {1}), ([4, 1], {1, 4})]:
        store.prefetch(2, np.array([[1, 4, 2]], np.int32))
        settle(store)
        ids = np.array([wanted], np.int32)
        stream = store.stream(2, ids)
        assert set(consume(disk, stream, 2, ids)) == set(wanted) - lost
        assert {wanted[int(pairs[0])] for pairs, _ in stream.failures} == lost
        drain(store)
        check_idle(store)
    assert store.stats().failed == 3


def test_a_passing_error_of_a_read_ahead_is_retried(disk, reader):  # noqa: F811
    bad = {tuple(disk.tables[2].ranges[1, 0, :2].tolist())}
    store = make(disk, FaultyReader(reader, fail_ranges(bad, times=1)), slots=16)
    store.prefetch(2, np.array([[1]], np.int32))
    ids = np.array([[1]], np.int32)
    stream = store.stream(2, ids)
    assert consume(disk, stream, 2, ids) == [1]
    assert stream.failures == []


def test_nothing_resident_gives_way_to_a_guess(disk, reader):  # noqa: F811
    store = make(disk, reader, slots=8)
    for _ in range(30):
        for layer in LAYERS:
            list(store.stream(layer, np.array([[1, 4]], np.int32)))
    resident = {key for key, slot in enumerate(store.policy.slot_of) if slot != NO_SLOT}
    for _ in range(5):
        store.prefetch(0, np.array([[0, 2, 3, 5, 6]], np.int32))
        settle(store)
        store.claim([])
        drain(store)
    assert resident <= {key for key, slot in enumerate(store.policy.slot_of) if slot != NO_SLOT}
    check_idle(store)


def test_demand_takes_every_slot_before_a_guess_gets_one(disk, reader):  # noqa: F811
    faulty = FaultyReader(reader)
    store = make(disk, faulty, slots=3, mode="none")
    ids = np.array([[0, 1, 2, 3, 4]], np.int32)
    stream = store.stream(0, ids)
    store.prefetch(2, np.array([[0, 1]], np.int32))
    order = []
    real = store._flight.submit
    store._flight.submit = lambda keys, ranges, ahead, later: (order.append(ahead), real(keys, ranges, ahead, later))
    consume(disk, stream, 0, ids)
    assert order == sorted(order), "a guess was read before the last demand read had its slot"
    assert True in order
    store.claim([])
    drain(store)
    check_idle(store)


def test_decode_reads_only_the_surest_of_what_is_missing(disk, reader):  # noqa: F811
    faulty = FaultyReader(reader)
    store = make(disk, faulty, slots=ALL)
    list(store.stream(2, np.array([[4, 6]], np.int32)))
    submitted = len(faulty.batches)
    store.prefetch(2, np.array([[6, 5, 4, 3, 2, 1, 0]], np.int32))
    [batch] = faulty.batches[submitted:]
    assert len(np.unique(batch[:, TICKET])) == READ_AHEAD
    settle(store)
    stream = store.stream(2, np.array([[5, 3, 2]], np.int32))
    assert sorted(next(stream).experts.tolist()) == [2, 3, 5]
    stream.close()
    check_idle(store)


@pytest.mark.parametrize("by", ["reset", "close"])
def test_reads_ahead_end_with_the_store(disk, reader, by):  # noqa: F811
    store = make(disk, reader, slots=16)
    ids = np.array([[0, 1, 2]], np.int32)
    stream = store.stream(0, ids)
    store.prefetch(2, np.array([[3, 4, 5, 6]], np.int32))
    next(stream)
    getattr(store, by)()
    assert reader.outstanding() == 0
    if by == "reset":
        check_idle(store)
        assert sorted(consume(disk, store.stream(2, ids), 2, ids)) == [0, 1, 2]
        check_idle(store)


def guess_and_stream(store, ids):
    store.prefetch(0, np.array([[3]], np.int32))
    for _ in store.stream(0, ids):
        pass


@pytest.mark.parametrize("moment", ["submit", "wait", "promote", "cancel"])
def test_after_an_interrupt_of_reading_ahead_a_reset_starts_afresh(disk, reader, monkeypatch, moment):  # noqa: F811
    store = make(disk, reader, slots=16)
    ids = np.array([[0, 1, 2]], np.int32)
    real = getattr(reader, moment)

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment != "submit":
            slow(patch, reader)
            store.prefetch(0, np.array([[0, 5]], np.int32))
        patch.setattr(reader, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            guess_and_stream(store, ids)
    store.reset()
    check_idle(store)
    assert sorted(consume(disk, store.stream(0, ids), 0, ids)) == [0, 1, 2]
    check_idle(store)


def run_steps(governor, with_ahead, without, steps):
    """Steps that read ahead, of so many."""
    on = 0
    for _ in range(steps):
        on += governor.on
        governor.step_ended(with_ahead if governor.on else without)
    return on


@pytest.mark.parametrize(("with_ahead", "without", "share"), [(0.9, 1.0, 0.95), (1.0, 0.9, 0.05)])
def test_the_faster_way_is_kept_and_the_other_tried_now_and_then(with_ahead, without, share):
    governor = Governor()
    steps = 20 * (HOLD + 2 * TRIAL)
    assert run_steps(governor, with_ahead, without, steps) / steps == pytest.approx(share, abs=0.01)


def test_the_governor_notices_that_things_changed():
    governor = Governor()
    run_steps(governor, 1.0, 2.0, HOLD)
    assert governor.on
    run_steps(governor, 3.0, 2.0, HOLD + 2 * TRIAL)
    assert not governor.on


def test_where_nothing_is_missed_nothing_is_predicted(disk, reader):  # noqa: F811
    store = make(disk, reader, slots=ALL)
    ids = np.array([[0, 1, 2]], np.int32)
    assert store.predictions(1, 100) == 0  # no experts there
    list(store.stream(0, ids))
    assert store.predictions(2, 100) > 0  # the first step
    for _ in range(2):
        for layer in LAYERS:
            list(store.stream(layer, ids))
    list(store.stream(0, ids))
    assert store.predictions(2, 100) == 0
    list(store.stream(2, np.array([[5]], np.int32)))
    list(store.stream(0, ids))
    assert store.predictions(2, 100) > 0
