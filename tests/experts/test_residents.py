"""Where every expert fits, what has landed is found without the policy, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from test_expert_store import EXPERTS, LAYERS, check_idle, consume, disk, make, router  # noqa: F401

from moestream.experts.resident import ResidentStream
from moestream.experts.stream import ExpertStream

ALL = 3 * EXPERTS


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("mode", ["arena", "hybrid"])
def test_resident_experts_have_the_right_bytes(disk, reader, mode, rows):  # noqa: F811
    store = make(disk, reader, ALL, mode)
    rng = np.random.default_rng(rows)
    kinds = set()
    for _ in range(30):
        for layer in LAYERS:
            ids = router(rng, rows, k=3)
            before = store.stats()
            stream = store.stream(layer, ids)
            kinds.add(type(stream))
            consume(disk, stream, layer, ids)
            account = store.stats() - before
            assert account.hits + account.misses == len(np.unique(ids))
            assert account.misses == 0 or type(stream) is ExpertStream
    assert kinds == {ExpertStream, ResidentStream}
    assert account.bytes_read == 0
    check_idle(store)


def test_nothing_is_resident_after_a_reset(disk, reader):  # noqa: F811
    store = make(disk, reader, ALL)
    ids = np.array([[4, 1, 2]], np.int32)
    consume(disk, store.stream(0, ids), 0, ids)
    assert isinstance(store.stream(0, ids), ResidentStream)
    store.reset()
    stream = store.stream(0, ids)
    assert isinstance(stream, ExpertStream)
    consume(disk, stream, 0, ids)


@pytest.mark.parametrize(("mode", "slots"), [("arena", ALL - 1), ("page", ALL), ("none", ALL)])
def test_nothing_is_resident_where_experts_may_be_evicted(disk, reader, mode, slots):  # noqa: F811
    store = make(disk, reader, slots, mode)
    ids = np.array([[4, 1, 2]], np.int32)
    for _ in range(2):
        stream = store.stream(0, ids)
        assert isinstance(stream, ExpertStream)
        consume(disk, stream, 0, ids)


def test_resident_streams_refuse_ids_out_of_range(disk, reader):  # noqa: F811
    store = make(disk, reader, ALL)
    everything = np.arange(EXPERTS, dtype=np.int32)[None]
    consume(disk, store.stream(0, everything), 0, everything)
    for wrong in (-1, EXPERTS):
        with pytest.raises(ValueError, match="expert ids must lie in"):
            store.stream(0, np.array([[0, wrong]], np.int32))


def test_a_closed_resident_stream_gives_nothing(disk, reader):  # noqa: F811
    store = make(disk, reader, ALL)
    ids = np.array([[4, 1, 2]], np.int32)
    consume(disk, store.stream(0, ids), 0, ids)
    stream = store.stream(0, ids)
    stream.close()
    assert list(stream) == []
    assert stream.failures == []


def test_the_policy_still_knows_what_is_used(disk, reader):  # noqa: F811
    store = make(disk, reader, ALL)
    everything = np.arange(EXPERTS, dtype=np.int32)[None]
    consume(disk, store.stream(0, everything), 0, everything)
    for _ in range(20):
        assert isinstance(store.stream(0, np.array([[3, 1]], np.int32)), ResidentStream)
    assert min(store.policy.probability(key) for key in (1, 3)) > 2 * store.policy.probability(0)
