"""What an onlooker sees of a store."""

import threading

import numpy as np
import pytest
from expert_disk import layout, write_stacked

from moestream.experts.activity import HEAT, READING, RESIDENT, cells
from moestream.experts.policy import LFRU, LRU
from moestream.experts.store import ExpertStore

EXPERTS = 7
LAYERS = 2
SLOTS = 6


def make(tmp_path, reader):
    disk = write_stacked(tmp_path, [layout(96), None, layout(32)], EXPERTS)
    return ExpertStore(disk.tables, disk.files, SLOTS, "arena", reader)


def test_cells_tell_what_is_resident_used_and_being_read(tmp_path, reader):
    store = make(tmp_path, reader)
    assert store.experts == [EXPERTS, 0, EXPERTS]
    assert not cells(store).any()
    stream = store.stream(2, np.array([[1, 3]], np.int32))
    began = cells(store)
    wanted = [EXPERTS + 1, EXPERTS + 3]  # layer 1 has no experts, so no keys
    assert (began[wanted] & READING).all()  # what has landed is known when it is asked for
    assert not (began[wanted] & RESIDENT).any()
    for _ in stream:
        pass
    ended = cells(store)
    resident = [key for key in range(LAYERS * EXPERTS) if store.policy.slot_of[key] >= 0]
    assert np.flatnonzero(ended & RESIDENT).tolist() == resident
    assert not (ended & READING).any()
    assert np.flatnonzero(ended & HEAT).tolist() == wanted  # used, wherever they are now
    store.close()


def test_streaming_time_counts_waits_and_nothing_between_streams(tmp_path, reader):
    store = make(tmp_path, reader)
    for _ in store.stream(0, np.array([[0, 1]], np.int32)):
        pass
    first, again = store.stats(), store.stats()
    assert first.stream_seconds >= first.stall_seconds > 0
    assert again.stream_seconds == first.stream_seconds
    stream = store.stream(0, np.array([[2, 3]], np.int32))
    running = store.stats().stream_seconds
    assert running > first.stream_seconds
    for _ in stream:
        pass
    assert store.stats().stream_seconds >= running
    store.close()


@pytest.mark.parametrize("policy", [LFRU, LRU])
def test_heat_halves_after_so_many_tokens_of_a_layer(policy):
    made = policy(8, [0, 0, 0, 1, 1, 1])

    def token(*keys):
        made.record(0, [k for k in keys if k < 3], [1] * 3, 1)
        made.record(1, [k for k in keys if k >= 3], [1] * 3, 1)

    token(0, 3)
    for _ in range(16):
        token(1, 4)
    heat = made.heat()
    assert heat[[0, 3]] == pytest.approx(0.5, rel=0.05)
    assert min(heat[[1, 4]]) > 0.95
    assert heat[[2, 5]].tolist() == [0, 0]


def test_looking_from_another_thread_disturbs_nothing(tmp_path, reader):
    """One thread streams, another looks without a pause; what is seen is never impossible."""
    store, done = make(tmp_path, reader), threading.Event()
    problems = []

    def look():
        while not done.is_set():
            seen = cells(store)
            if np.count_nonzero(seen & RESIDENT) > SLOTS:
                problems.append(seen)

    onlooker = threading.Thread(target=look)
    onlooker.start()
    rng = np.random.default_rng(0)
    for step in range(300):
        ids = rng.permutation(EXPERTS)[None, :3].astype(np.int32)
        served = [expert for wave in store.stream((0, 2)[step % 2], ids) for expert in wave.experts.tolist()]
        assert sorted(served) == sorted(ids[0].tolist())
    done.set()
    onlooker.join()
    store.close()
    assert not problems
