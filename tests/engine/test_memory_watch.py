"""The cache gives way to others, and comes back when they are gone."""

import dataclasses
import gc
import threading
import time
import weakref

import numpy as np
import pytest
from golden_models import GREEDY
from streamed import BadSectors, check_idle
from test_engine_models import PARAMS, check_replies
from test_engine_streaming import make, run_alone

from moestream import system
from moestream.config import RunConfig
from moestream.engine import memory_watch
from moestream.engine.load import load_runtime
from moestream.engine.memory_watch import PATIENCE, MemoryWatch
from moestream.experts.store import ExpertStore

KEPT = 900


class Store:
    """Slots of 10 bytes, without experts."""

    class arena:
        slots, slot_nbytes = 80, 10

    def __init__(self):
        self.slots = 80
        self.policy = self
        self.capacity = 80
        self.resizes = 0

    @property
    def usable(self):
        return self.slots

    def resize(self):
        self.capacity = self.slots
        self.resizes += 1


@pytest.fixture
def watched():
    """A store, its lock, what is available, and one look."""
    store, lock, free = Store(), threading.RLock(), [KEPT]
    watch = MemoryWatch(store, lock, KEPT, lambda: free[0])
    return store, lock, free, lambda: watch.look(store)


def test_nothing_happens_while_there_is_enough(watched):
    store, _, free, look = watched
    for free[0] in (KEPT, KEPT // 3, 2 * KEPT, 100 * KEPT):
        for _ in range(PATIENCE + 1):
            look()
    assert (store.slots, store.resizes) == (80, 0)


def test_what_is_missing_is_given_back(watched):
    store, _, free, look = watched
    free[0] = KEPT // 3 - 1  # 299
    look()
    assert store.slots == store.capacity == 80 - 61


def test_the_least_that_is_kept(watched):
    store, _, free, look = watched
    free[0] = 0
    for _ in range(5):
        look()
    assert store.slots == 10


def test_slots_come_back_only_after_a_while_of_plenty(watched):
    store, _, free, look = watched
    free[0] = 200
    look()
    assert store.slots == 10
    free[0] = 2 * KEPT + 50
    for _ in range(PATIENCE - 1):
        look()
    free[0] = 2 * KEPT
    look()
    free[0] = KEPT + 1000
    for _ in range(PATIENCE - 1):
        look()
    assert store.slots == 10
    look()
    assert store.slots == store.capacity == 80
    free[0] = 100 * KEPT
    for _ in range(2 * PATIENCE):
        look()
    assert store.slots == 80


def test_while_the_model_runs_the_store_is_only_asked(watched):
    store, lock, free, look = watched
    free[0] = 0
    held, done = threading.Event(), threading.Event()

    def run():
        with lock:
            held.set()
            done.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    held.wait(10)
    look()
    assert (store.slots, store.capacity) == (10, 80)
    free[0] = KEPT  # asked once, not again and again
    look()
    assert (store.slots, store.capacity) == (10, 80)
    done.set()
    thread.join()
    look()
    assert store.capacity == 10


@pytest.mark.parametrize("tiny", ["qwen3-f16-single", "qwen3_5-f32-single"], indirect=True)
def test_replies_stay_right_whatever_is_given_up_meanwhile(tiny, exact_ops, monkeypatch):
    """In steps, between them, and while a sweep rests; by another thread, as it really is."""
    monkeypatch.setattr("moestream.models.batch.BLOCK", 32)
    monkeypatch.setattr(memory_watch, "_SECONDS", 0.0005)
    disk = BadSectors()
    engine, store = make(tiny, exact_ops, disk, 60, prefill_chunk=70)
    random, sizes = np.random.default_rng(0), set()

    def available():
        store.slots = int(random.integers(8, 61))
        sizes.add(store.policy.capacity)
        return KEPT

    watch = MemoryWatch(store, engine.running, KEPT, available)
    watch.start()
    try:
        for _ in range(3):
            check_replies(engine, tiny, apart=1)
        assert run_alone(engine, tiny.ids(0)[:-GREEDY]) == tiny.ids(0)[-GREEDY:].tolist()
    finally:
        watch.close()
        disk.close()
    assert len(sizes) > 10
    check_idle(store)


@pytest.mark.parametrize("tiny", ["qwen3-f16-single"], indirect=True)
def test_only_a_budget_that_nobody_named_is_watched(tiny, monkeypatch):
    monkeypatch.setattr(memory_watch, "WORTHWHILE", 0)
    for run, watches in ((RunConfig(), True), (RunConfig(ram=system.rss() + 300_000_000), False)):
        runtime = load_runtime(tiny.folder, run)
        assert (runtime.watch is not None) == watches
        names = [t.name for t in threading.enumerate()]
        assert ("moestream-memory" in names) == watches
        runtime.close()
        assert "moestream-memory" not in [t.name for t in threading.enumerate()]
    monkeypatch.setattr(memory_watch, "WORTHWHILE", 1 << 50)
    runtime = load_runtime(tiny.folder, RunConfig())
    assert runtime.watch is None
    runtime.close()


@pytest.mark.parametrize("tiny", ["qwen3-f16-single"], indirect=True)
def test_a_loaded_model_borrows_for_its_sweeps(tiny, monkeypatch):
    monkeypatch.setattr("moestream.plan.rss", lambda: 10**8)  # which would change between the two plans
    run = RunConfig(max_batch=1, context=300, prefill_chunk=256)
    whole = load_runtime(tiny.folder, run)
    plan, lent, lend = whole.plan, [], ExpertStore.lend
    whole.close()
    monkeypatch.setattr(ExpertStore, "lend", lambda store, slots: (lent.append(slots), lend(store, slots)))
    runtime = load_runtime(tiny.folder, dataclasses.replace(run, ram=plan.fixed + plan.arena * 3 // 4))
    try:
        sequence = runtime.engine.add([7] * 250, dataclasses.replace(PARAMS, max_tokens=3))
        capacities = []
        while not runtime.engine.idle:
            runtime.engine.step()
            capacities.append(runtime.store.policy.capacity)
        borrowed = runtime.plan.borrowed_slots(250)
        assert borrowed > 0
        assert lent == [borrowed, 0, 0]
        assert capacities == [runtime.plan.slots - borrowed, runtime.plan.slots, runtime.plan.slots]
        assert len(sequence.tokens) == 3
    finally:
        runtime.close()


def test_a_watch_ends_with_its_store(monkeypatch):
    monkeypatch.setattr(memory_watch, "_SECONDS", 0.001)
    store = Store()
    watch, gone = MemoryWatch(store, threading.RLock(), KEPT, lambda: KEPT), weakref.ref(store)
    watch.start()
    del store
    gc.collect()
    deadline = time.monotonic() + 10
    while (gone() is not None or watch._thread.is_alive()) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert gone() is None
    assert not watch._thread.is_alive()
