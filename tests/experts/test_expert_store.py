"""Whatever the disk does, a wave holds the bytes of the file, every pair is served once or named as failed."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from expert_disk import Disk, FaultyReader, fail_ranges, layout, write_packed, write_stacked
from streamed import check_slots

from moestream.checkpoint.encoding import Encoding, ExpertTable
from moestream.errors import ReadError, TensorError
from moestream.experts.layer_plan import slot_nbytes
from moestream.experts.store import ExpertStore

EXPERTS = 7
MODES = ("arena", "page", "none")
LAYOUTS = [layout(96), None, layout(32, encoding=Encoding("bf16")), layout(32)]
LAYERS = [0, 2, 3]


@pytest.fixture
def disk(tmp_path) -> Disk:
    return write_stacked(tmp_path, LAYOUTS, EXPERTS)


def make(disk, reader, slots=4, mode="arena") -> ExpertStore:
    return ExpertStore(disk.tables, disk.files, slots, mode, reader)


def router(rng, rows, k):
    return np.stack([rng.permutation(EXPERTS)[:k] for _ in range(rows)]).astype(np.int32)


def check_bytes(disk, wave):
    for i, expert in enumerate(wave.experts.tolist()):
        for part, (offset, nbytes) in enumerate(zip(wave.places(i), wave.layout.part_nbytes, strict=True)):
            expected = disk.truth(wave.layer, expert, part)
            assert wave.memory[offset : offset + nbytes].tobytes() == expected, (wave.layer, expert, part)


def consume(disk, stream, layer, ids):
    """Check every wave in full; return served experts in order of arrival."""
    flat = ids.reshape(-1)
    served, pairs = [], []
    for wave in stream:
        assert wave.layer == layer
        assert wave.layout is disk.tables[layer].layout
        assert wave.starts[0] == 0
        assert wave.starts[-1] == len(wave.pairs)
        for i, expert in enumerate(wave.experts.tolist()):
            own = wave.pairs[wave.starts[i] : wave.starts[i + 1]].tolist()
            assert own == np.flatnonzero(flat == expert).tolist()
        check_bytes(disk, wave)
        served += wave.experts.tolist()
        pairs += wave.pairs.tolist()
    assert len(set(served)) == len(served)
    failed = [p for own, _ in stream.failures for p in own.tolist()]
    assert sorted(pairs + failed) == list(range(flat.size))
    return served


def check_idle(store):
    """Nothing pinned, nothing lost: every slot is free or holds one expert."""
    check_slots(store)
    assert store.reader.outstanding() == 0


@pytest.mark.parametrize("slots", range(1, 10))
@pytest.mark.parametrize("mode", MODES)
def test_every_wave_holds_the_files_bytes(disk, reader, mode, slots):
    store = make(disk, reader, slots, mode)
    rng = np.random.default_rng(slots)
    for step in range(6):
        for layer in LAYERS:
            ids = router(rng, rows=(1, 1, 5)[step % 3], k=3)
            consume(disk, store.stream(layer, ids), layer, ids)
            check_idle(store)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("mode", MODES)
def test_order_of_arrival_and_failures_never_change_what_is_served(disk, reader, mode, slots):
    layer, rng = 0, np.random.default_rng(slots)
    bad = {tuple(disk.tables[layer].ranges[expert, part, :2].tolist()) for expert, part in [(1, 0), (1, 4), (5, 8)]}
    faulty = FaultyReader(reader, fail_ranges(bad), shuffle=True, seed=slots)
    store = make(disk, faulty, slots, mode)
    for _ in range(8):
        ids = router(rng, rows=4, k=3)
        stream = store.stream(layer, ids)
        served = consume(disk, stream, layer, ids)
        assert set(served) == set(ids.reshape(-1).tolist()) - {1, 5}
        assert {int(ids.reshape(-1)[pairs[0]]) for pairs, _ in stream.failures} == {1, 5} & set(
            ids.reshape(-1).tolist()
        )
        check_idle(store)
        ids = router(rng, rows=2, k=2)
        consume(disk, store.stream(2, ids), 2, ids)
        check_idle(store)


def test_a_passing_io_error_is_retried_and_costs_nothing(disk, reader):
    bad = {tuple(disk.tables[0].ranges[e, 0, :2].tolist()) for e in (0, 3, 4)}
    store = make(disk, FaultyReader(reader, fail_ranges(bad, times=1)))
    ids = np.array([[0, 3], [4, 3]], np.int32)
    stream = store.stream(0, ids)
    assert sorted(consume(disk, stream, 0, ids)) == [0, 3, 4]
    assert stream.failures == []
    assert store.stats().failed == 0


def test_a_lasting_error_names_file_offset_and_reason(disk, reader):
    file, offset, nbytes = disk.tables[0].ranges[3, 2].tolist()
    store = make(disk, FaultyReader(reader, fail_ranges({(file, offset)})))
    ids = np.array([[3, 1], [2, 3]], np.int32)
    stream = store.stream(0, ids)
    assert sorted(consume(disk, stream, 0, ids)) == [1, 2]
    [(pairs, error)] = stream.failures
    assert pairs.tolist() == [0, 3]
    assert isinstance(error, ReadError)
    for text in (disk.files[file].name, str(offset + nbytes // 2), "Input/output error"):
        assert text in str(error)
    assert store.stats().failed == 1
    ids = np.array([[3]], np.int32)
    store.reader.fault = lambda file, offset: None
    assert consume(disk, store.stream(0, ids), 0, ids) == [3]


def test_errors_other_than_eio_are_not_retried(disk, reader):
    file, offset, _ = disk.tables[0].ranges[3, 0].tolist()
    faulty = FaultyReader(reader, fail_ranges({(file, offset)}, errno.EACCES, times=1))
    store = make(disk, faulty)
    ids = np.array([[3]], np.int32)
    stream = store.stream(0, ids)
    assert consume(disk, stream, 0, ids) == []
    assert len(faulty.batches) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_file_truncated_under_us_fails_only_what_it_lost(disk, reader, mode):
    store = make(disk, reader, 8, mode)
    file, offset, nbytes = disk.tables[3].ranges[EXPERTS - 1, 8].tolist()
    with disk.files[file].open("r+b") as f:
        f.truncate(offset + nbytes - 1)
    ids = np.array([[0, EXPERTS - 1]], np.int32)
    stream = store.stream(3, ids)
    waves = [wave.experts.tolist() for wave in stream]
    assert waves == [[0]]
    [(pairs, error)] = stream.failures
    assert pairs.tolist() == [1]
    assert disk.files[file].name in str(error)
    assert f"({offset + nbytes - 1} bytes)" in str(error)
    check_idle(store)


@pytest.mark.parametrize("slots", [1, 2, 4, 6])
@pytest.mark.parametrize("mode", MODES)
def test_an_abandoned_stream_leaves_the_store_usable(disk, reader, mode, slots):
    faulty = FaultyReader(reader, shuffle=True)
    store = make(disk, faulty, slots, mode)
    rng = np.random.default_rng(0)
    for step in range(12):
        stream = store.stream(LAYERS[step % 3], router(rng, 2, 3))
        for _ in range(step % 4):
            next(stream, None)
        if step % 2:
            stream.close()
            check_idle(store)
        ids = router(rng, 2, 3)
        consume(disk, store.stream(0, ids), 0, ids)
        check_idle(store)
    store.stream(0, router(rng, 2, 3))
    store.close()
    assert reader.outstanding() == 0


@pytest.mark.parametrize("by", ["close", "next stream"])
def test_a_stream_ended_early_does_not_look_complete(disk, reader, by):
    store = make(disk, reader)
    ids = np.array([[0, 1, 2]], np.int32)
    stream = store.stream(0, ids)
    if by == "close":
        stream.close()
        stream.close()
    else:
        store.stream(0, ids)
    with pytest.raises(RuntimeError, match="layer 0 was closed before its end"):
        next(stream)
    stream = store.stream(0, ids)
    assert sorted(consume(disk, stream, 0, ids)) == [0, 1, 2]
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize("moment", ["submit", "wait"])
@pytest.mark.parametrize("slots", [1, 3])
def test_after_an_interrupt_and_a_reset_the_store_starts_afresh(disk, reader, monkeypatch, moment, slots):
    store = make(disk, reader, slots)
    ids = np.array([[0, 1, 2], [5, 1, 6]], np.int32)
    real = getattr(reader, moment)

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reader, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            for _ in store.stream(0, ids):
                pass
    store.reset()
    check_idle(store)
    assert sorted(consume(disk, store.stream(0, ids), 0, ids)) == [0, 1, 2, 5, 6]
    check_idle(store)


def test_a_store_that_holds_everything_reads_each_expert_once(disk, reader):
    store = make(disk, reader, slots=3 * EXPERTS)
    ids = np.arange(EXPERTS, dtype=np.int32)[None]
    for layer in LAYERS:
        consume(disk, store.stream(layer, ids), layer, ids)
    before = store.stats()
    assert (before.hits, before.misses) == (0, 3 * EXPERTS)
    for layer in LAYERS:
        [wave] = store.stream(layer, ids)
        check_bytes(disk, wave)
    account = store.stats() - before
    assert (account.hits, account.misses, account.bytes_read) == (3 * EXPERTS, 0, 0)
    assert account.hit_rate == 1.0
    assert account.overlap == 1.0


@pytest.mark.parametrize("mode", ["page", "none"])
def test_modes_that_keep_nothing_read_again(disk, reader, mode):
    store = make(disk, reader, slots=3 * EXPERTS, mode=mode)
    ids = np.array([[2, 4]], np.int32)
    nbytes = 2 * disk.tables[0].layout.nbytes
    for i in range(1, 4):
        consume(disk, store.stream(0, ids), 0, ids)
        stats = store.stats()
        assert (stats.hits, stats.misses) == (0, 2 * i)
        assert stats.bytes_read + stats.bytes_cached >= i * nbytes


def test_hits_come_first_and_misses_are_already_being_read(disk, reader):
    faulty = FaultyReader(reader)
    store = make(disk, faulty, slots=EXPERTS)
    warm = np.array([[5, 1]], np.int32)
    consume(disk, store.stream(0, warm), 0, warm)
    ids = np.array([[0, 1, 5]], np.int32)
    submitted = len(faulty.batches)
    stream = store.stream(0, ids)
    assert len(faulty.batches) == submitted + 1
    first = next(stream)
    assert first.experts.tolist() == [1, 5]
    assert first.pairs.tolist() == [1, 2]
    assert [w.experts.tolist() for w in stream] == [[0]]


def test_all_reads_of_a_layer_are_one_batch(disk, reader):
    faulty = FaultyReader(reader)
    store = make(disk, faulty, slots=EXPERTS)
    ids = router(np.random.default_rng(0), 3, 3)
    distinct = len(np.unique(ids))
    consume(disk, store.stream(0, ids), 0, ids)
    assert [len(batch) for batch in faulty.batches] == [9 * distinct]


def test_parts_that_lie_together_are_one_read(tmp_path, reader):
    disk = write_packed(tmp_path, layout(96), EXPERTS)
    faulty = FaultyReader(reader)
    store = make(disk, faulty, slots=2)
    ids = np.array([[6, 0, 3]], np.int32)
    consume(disk, store.stream(0, ids), 0, ids)
    assert sum(len(batch) for batch in faulty.batches) == 3


def test_a_sweep_over_everything_does_not_wipe_popular_experts(disk, reader):
    store = make(disk, reader, slots=8)
    popular = np.array([[1, 4]], np.int32)
    sweep = np.arange(EXPERTS, dtype=np.int32).repeat(2).reshape(-1, 2)
    for _ in range(30):
        for layer in LAYERS:
            consume(disk, store.stream(layer, popular), layer, popular)
    for layer in LAYERS:
        consume(disk, store.stream(layer, sweep), layer, sweep)
    before = store.stats()
    for layer in LAYERS:
        consume(disk, store.stream(layer, popular), layer, popular)
    assert (store.stats() - before).hits == 6


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_row_may_name_the_same_expert_twice(disk, reader, slots):
    """The router never does; whoever imposes its choice may. It comes in one wave or in several."""
    store = make(disk, reader, slots)
    ids = np.array([[2, 5, 2]], np.int32)
    for _ in range(2):
        consume(disk, store.stream(0, ids), 0, ids)
    check_idle(store)


def test_no_rows_no_waves(disk, reader):
    store = make(disk, reader)
    assert list(store.stream(0, np.empty((0, 3), np.int32))) == []
    check_idle(store)


def test_bad_requests_are_refused(disk, reader, tmp_path):
    store = make(disk, reader)
    with pytest.raises(ValueError, match="layer 1 has no experts"):
        store.stream(1, np.zeros((1, 1), np.int32))
    for bad in (-1, EXPERTS):
        with pytest.raises(ValueError, match=r"expert ids must lie in 0\.\.6"):
            store.stream(0, np.array([[0, bad]], np.int32))
    check_idle(store)
    with pytest.raises(ValueError, match="slots must be at least 1"):
        make(disk, reader, slots=0)
    wrong = ExpertTable(layout(128), disk.tables[0].ranges)
    with pytest.raises(TensorError, match="layer 0"):
        ExpertStore([wrong], disk.files, 2, "arena", reader)
    with pytest.raises(ReadError, match=r"gone\.bin: cannot open: No such file"):
        ExpertStore(disk.tables, [tmp_path / "gone.bin", disk.files[1]], 2, "arena", reader)


def test_page_mode_is_never_direct(disk, native_reader):
    assert not make(disk, native_reader, mode="page").direct
    direct = native_reader.is_direct(native_reader.open(disk.files[0], True))  # unless the file system refuses
    assert make(disk, native_reader, mode="arena").direct == direct


def test_a_slot_holds_the_largest_expert_of_any_layer(disk, reader):
    store = make(disk, reader, slots=3)
    largest = slot_nbytes(disk.tables)
    assert store.arena.slot_nbytes == largest
    assert largest > max(t.layout.nbytes for t in disk.tables if t is not None)
    assert store.arena.memory.nbytes == 3 * largest
