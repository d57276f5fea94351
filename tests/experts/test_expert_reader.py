"""Both readers deliver the same bytes, and say what they could not deliver."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from moestream.checkpoint.encoding import Extent
from moestream.errors import ReadError
from moestream.experts.arena import allocate, area_nbytes, load_extents
from moestream.experts.native_reader import NativeReader
from moestream.experts.python_reader import PythonReader
from moestream.experts.reader import BLOCK, DEST, NBYTES, OFFSET, TICKET, read_error

SIZE = 5 * (1 << 20) + 1234


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8).tobytes())
    return path


def place(file_id, ranges, memory, first_ticket=0):
    """A batch with one ticket per (offset, nbytes), skewed, in areas behind each other."""
    batch = np.zeros((len(ranges), 5), np.int64)
    start = 0
    for i, (offset, nbytes) in enumerate(ranges):
        batch[i] = file_id, offset, nbytes, memory.ctypes.data + start + offset % BLOCK, first_ticket + i
        start += area_nbytes(nbytes)
    assert start <= memory.nbytes
    return batch


def collect(reader, count):
    done, failed = [], []
    while len(done) + len(failed) < count:
        some, bad = reader.wait(1, 10.0)
        assert some or bad
        done += some
        failed += bad
    return done, failed


def got(memory, row):
    start = row[DEST] - memory.ctypes.data
    return memory[start : start + row[NBYTES]].tobytes()


@pytest.mark.parametrize("direct", [True, False])
def test_any_range_arrives_as_it_is_in_the_file(reader, file, direct):
    data = file.read_bytes()
    sizes = [1, 2, 511, 512, 4095, 4096, 4097, 70001, 2 << 20, (3 << 20) + 1, SIZE]
    ranges = [(o, n) for o in (0, 1, 511, 4095, 4096, 4097, 123_457) for n in sizes if o + n <= SIZE]
    ranges += [(SIZE - n, n) for n in sizes]  # up to the odd end of the file
    memory = allocate(sum(area_nbytes(n) for _, n in ranges))
    reader.attach(memory)
    batch = place(reader.open(file, direct), ranges, memory)
    reader.submit(batch)
    done, failed = collect(reader, len(batch))
    assert sorted(done) == list(range(len(batch)))
    assert failed == []
    for row in batch.tolist():
        assert got(memory, row) == data[row[OFFSET] : row[OFFSET] + row[NBYTES]]
    counters = reader.counters()
    assert counters.bytes_asked == sum(n for _, n in ranges)
    assert counters.bytes_disk + counters.bytes_cached >= counters.bytes_asked
    assert counters.errors == 0
    assert reader.outstanding() == 0


def test_direct_reads_touch_nothing_beyond_their_blocks(native_reader, file):
    memory = allocate(area_nbytes(3 * BLOCK) + 2 * BLOCK)
    memory[:] = 7
    native_reader.attach(memory)
    native_reader.submit(
        np.array([[native_reader.open(file, True), 100, 5000, memory.ctypes.data + BLOCK + 100, 0]], np.int64)
    )
    collect(native_reader, 1)
    assert memory[BLOCK + 100 : BLOCK + 5100].tobytes() == file.read_bytes()[100:5100]
    assert (memory[:BLOCK] == 7).all()
    assert (memory[3 * BLOCK :] == 7).all()


def test_the_native_reader_bypasses_the_page_cache_where_it_says_so(native_reader, file):
    memory = allocate(area_nbytes(SIZE))
    native_reader.attach(memory)
    fd = native_reader.open(file, True)
    native_reader.submit(place(fd, [(0, SIZE)], memory))
    collect(native_reader, 1)
    counters = native_reader.counters()
    if native_reader.is_direct(fd):
        assert counters.bytes_cached == 0
        assert counters.bytes_disk >= SIZE
    else:
        assert counters.bytes_disk + counters.bytes_cached == SIZE


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a file system that refuses direct reads")
def test_where_direct_reads_are_refused_the_file_is_read_buffered(native_reader):
    path = Path("/proc/version")
    fd = native_reader.open(path, True)
    assert not native_reader.is_direct(fd)
    memory = allocate(area_nbytes(8))
    native_reader.attach(memory)
    batch = place(fd, [(5, 8)], memory)
    native_reader.submit(batch)
    assert collect(native_reader, 1) == ([0], [])
    assert got(memory, batch[0].tolist()) == path.read_bytes()[5:13]


def test_a_ticket_is_done_when_all_its_ranges_are(reader, file):
    ranges = [(i * 1000, 900) for i in range(30)]
    memory = allocate(sum(area_nbytes(n) for _, n in ranges))
    reader.attach(memory)
    batch = place(reader.open(file, True), ranges, memory)
    batch[:, 4] = np.arange(30) // 10
    reader.submit(batch)
    done, _ = collect(reader, 3)
    assert sorted(done) == [0, 1, 2]
    assert reader.wait(5, 10.0) == ([], [])  # nothing outstanding: returns at once


def test_wait_returns_when_the_time_is_over(reader):
    assert reader.wait(1, 0.0) == ([], [])


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_past_the_end_fails_alone_and_says_where_the_file_ended(reader, file, direct):
    fd = reader.open(file, direct)
    ranges = [(0, 10), (SIZE - 5, 6), (SIZE + 9000, 10), (100, 10)]
    memory = allocate(4 * area_nbytes(10))
    reader.attach(memory)
    reader.submit(place(fd, ranges, memory))
    done, failed = collect(reader, 4)
    assert sorted(done) == [0, 3]
    by_ticket = {f.ticket: f for f in failed}
    assert set(by_ticket) == {1, 2}
    assert (by_ticket[1].code, by_ticket[1].offset) == (0, SIZE)
    error = read_error(reader, by_ticket[1])
    assert isinstance(error, ReadError)
    assert str(error).startswith(f"{file}: cannot read at offset {SIZE}: the file ends there ({SIZE} bytes)")
    assert reader.counters().errors == 2


def test_an_error_of_the_system_carries_its_errno(reader, tmp_path):
    fd = reader.open(tmp_path, False)  # a folder opens, but cannot be read
    memory = allocate(area_nbytes(10))
    reader.attach(memory)
    reader.submit(place(fd, [(0, 10)], memory))
    _, [failure] = collect(reader, 1)
    assert failure.code == errno.EISDIR
    assert os.strerror(errno.EISDIR) in str(read_error(reader, failure))


def test_a_missing_file_is_a_read_error(reader, tmp_path):
    with pytest.raises(ReadError, match=r"absent\.bin: cannot open: No such file"):
        reader.open(tmp_path / "absent.bin", True)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 99, "no open file has id 99"),
        (0, -1, "no open file has id -1"),
        (1, -4096, "not a range"),
        (2, 0, "not a range"),
        (2, -5, "not a range"),
        (2, 1 << 30, "outside the attached memory"),
        (3, 4096 * 1000, "outside the attached memory"),
    ],
)
def test_a_bad_batch_is_refused_as_a_whole(reader, file, column, value, message):
    memory = allocate(2 * area_nbytes(100))
    reader.attach(memory)
    batch = place(reader.open(file, True), [(0, 100), (4096, 100)], memory)
    batch[1, column] = value
    with pytest.raises(ValueError, match=message):
        reader.submit(batch)
    assert reader.outstanding() == 0


def test_native_checks_of_overflow_skew_and_tickets(native_reader, file):
    memory = allocate(2 * area_nbytes(100))
    native_reader.attach(memory)
    good = place(native_reader.open(file, True), [(0, 100), (4096, 100)], memory)
    for column, value, message in [
        (1, (1 << 63) - 1, "not a range"),
        (2, (1 << 63) - 1, "not a range"),
        (3, (1 << 63) - 1, "not a range"),
        (3, memory.ctypes.data + 1, "differ modulo 4096"),
        (3, memory.ctypes.data + memory.nbytes - 50, "not|differ|outside"),
    ]:
        bad = good.copy()
        bad[1, column] = value
        with pytest.raises(ValueError, match=message):
            native_reader.submit(bad)
    with pytest.raises(TypeError):
        native_reader.submit(good[:, :4])


def sparse(tmp_path, nbytes):
    path = tmp_path / "sparse.bin"
    with path.open("wb") as f:
        f.truncate(nbytes)
    return path


def test_an_outstanding_ticket_cannot_be_used_twice(reader, tmp_path):
    memory = allocate(area_nbytes(1 << 20))
    reader.attach(memory)
    one = place(reader.open(sparse(tmp_path, 1 << 20), True), [(0, 1 << 20)], memory, first_ticket=5)
    reader.submit(np.repeat(one, 2000, axis=0))
    with pytest.raises(ValueError, match="ticket 5 is already outstanding"):
        reader.submit(one)
    assert collect(reader, 1) == ([5], [])


def test_demand_reads_go_before_prefetch_and_prefetch_can_be_cancelled(tmp_path):
    reader = NativeReader(threads=1)
    fd = reader.open(sparse(tmp_path, 1 << 20), True)
    memory = allocate(area_nbytes(1 << 20))
    reader.attach(memory)
    batch = np.repeat(place(fd, [(0, 1 << 20)], memory), 1000, axis=0)  # into the same place: about 0.1 s
    batch[:, 4] = np.arange(1000)
    reader.submit(batch, prefetch=True)
    reader.submit(np.array([[*batch[0, :4], 5000]], np.int64))
    order = []
    while 5000 not in order:
        order += reader.wait(1, 10.0)[0]
    assert len(order) < 1000, "all prefetch reads were done before the demand read"
    reader.cancel_prefetch()
    done, failed = collect(reader, 1001 - len(order))
    assert sorted(done + order + [f.ticket for f in failed]) == [*range(1000), 5000]
    assert {f.code for f in failed} == {errno.ECANCELED}
    assert reader.counters().errors == 0
    reader.close()


@pytest.mark.parametrize("make", [NativeReader, PythonReader])
def test_prefetch_reads_keep_their_limit(tmp_path, make):
    reader = make(4)
    fd = reader.open(sparse(tmp_path, 1 << 20), True)
    memory = allocate(area_nbytes(1 << 20))
    reader.attach(memory)
    batch = np.repeat(place(fd, [(0, 1 << 20)], memory), 400, axis=0)
    batch[::2, NBYTES] = 4096  # short ones overtake long ones where more than one runs at a time

    def order(first):
        batch[:, TICKET] = np.arange(first, first + 400)
        reader.submit(batch, prefetch=True)
        return collect(reader, 400)[0]

    reader.limit_prefetch(1)
    assert order(0) == list(range(400))
    reader.limit_prefetch(4)
    # where holes are read in no time, one thread may do it all before another is awake
    assert any(order(first) != list(range(first, first + 400)) for first in range(400, 80_000, 400))
    reader.close()


def test_promoted_reads_wake_threads_that_the_limit_kept_asleep(tmp_path):
    """The native reader cannot be held back from outside; it was seen with a pread that sleeps."""
    ended = threading.Event()

    class Held(PythonReader):
        def _read(self, row, target):
            assert row[TICKET] or ended.wait(10.0), "no promoted read ran before the first one had ended"
            return super()._read(row, target)

    reader = Held(4)
    fd = reader.open(sparse(tmp_path, BLOCK), True)
    memory = allocate(4 * area_nbytes(BLOCK))
    reader.attach(memory)
    reader.limit_prefetch(1)
    reader.submit(place(fd, [(0, BLOCK)] * 4, memory), prefetch=True)
    time.sleep(0.05)  # the first one runs, the other threads have looked and sleep
    reader.promote([1, 2, 3])
    try:
        assert sorted(collect(reader, 3)[0]) == [1, 2, 3]
    finally:
        ended.set()
    assert collect(reader, 1) == ([0], [])
    reader.close()


def test_a_limit_of_no_prefetch_reads_is_refused(reader):
    with pytest.raises(ValueError, match="at least one prefetch read"):
        reader.limit_prefetch(0)


def test_closing_drops_what_is_queued(tmp_path, reader):
    fd = reader.open(sparse(tmp_path, 1 << 20), False)
    memory = allocate(area_nbytes(1 << 20))
    reader.attach(memory)
    batch = np.repeat(place(fd, [(0, 1 << 20)], memory), 500, axis=0)
    batch[:, 4] = np.arange(500)
    reader.submit(batch)
    with pytest.raises(ValueError, match="while reads are outstanding"):
        reader.detach(memory)
    reader.close()
    assert reader.outstanding() == 0
    with pytest.raises(ValueError, match="closed"):
        reader.submit(batch)
    reader.close()


def test_detached_memory_is_not_written(reader, file):
    memory = allocate(area_nbytes(10))
    reader.attach(memory)
    reader.detach(memory)
    with pytest.raises(ValueError, match="outside the attached memory"):
        reader.submit(place(reader.open(file, False), [(0, 10)], memory))


@pytest.mark.parametrize("direct", [True, False])
def test_load_extents_returns_each_extent(reader, file, tmp_path, direct, monkeypatch):
    monkeypatch.setattr("moestream.experts.arena.LOAD_PIECE", 1 << 20)  # several pieces an extent
    other = tmp_path / "other.bin"
    other.write_bytes(b"0123456789")
    extents = [Extent(1, 3, 4), Extent(0, 17, SIZE - 17), Extent(0, 0, 1), Extent(1, 0, 10), Extent(0, 4096, 0)]
    seen = []
    arrays = load_extents(reader, [file, other], extents, direct=direct, progress=seen.append)
    data = file.read_bytes()
    assert [a.tobytes() for a in arrays] == [b"3456", data[17:], data[:1], b"0123456789", b""]
    assert sum(seen) == sum(e.nbytes for e in extents)
    assert load_extents(reader, [], []) == []


def test_load_extents_names_the_file_that_is_too_short(reader, file):
    with pytest.raises(ReadError, match=rf"data\.bin: cannot read at offset {SIZE}: the file ends there"):
        load_extents(reader, [file], [Extent(0, 5, 10), Extent(0, SIZE - 10, 20)])
    assert reader.outstanding() == 0
    [array] = load_extents(reader, [file], [Extent(0, 5, 10)])
    assert array.tobytes() == file.read_bytes()[5:15]


def test_probe_reads_the_file(native_reader, file, tmp_path):
    from moestream._native import probe_read

    assert probe_read(str(file), 1 << 20, 0.02, True, 2) > 0
    with pytest.raises(ValueError, match="smaller than one block"):
        probe_read(str(file), 8 << 20, 0.02, False, 2)
    with pytest.raises(ValueError, match="multiple of 4096"):
        probe_read(str(file), 1000, 0.02, True, 2)
    with pytest.raises(FileNotFoundError):
        probe_read(str(tmp_path / "absent"), 4096, 0.02, True, 2)


@pytest.fixture(params=["native", "python"])
def one_thread(request):
    if request.param == "native":
        pytest.importorskip("moestream._native")
    reader = NativeReader(threads=1) if request.param == "native" else PythonReader(threads=1)
    yield reader
    reader.close()


@pytest.fixture
def queued(tmp_path, one_thread):
    """Prefetch tickets 0..99 and demand tickets 1000..1999 of a busy reader."""
    fd = one_thread.open(sparse(tmp_path, 1 << 20), False)
    memory = allocate(area_nbytes(1 << 20))
    one_thread.attach(memory)
    batch = np.repeat(place(fd, [(0, 1 << 20)], memory), 1100, axis=0)  # into the same place: about 0.1 s
    batch[:, TICKET] = [*range(1000, 2000), *range(100)]
    one_thread.submit(batch[:1000])
    one_thread.submit(batch[1000:], prefetch=True)
    return one_thread


def test_a_promoted_read_goes_before_all_others(queued):
    queued.promote([50, 51, 1500, 7777])  # a demand read and a stranger change nothing
    order = []
    while len(order) < 1100:
        order += queued.wait(1, 10.0)[0]
    assert sorted(order) == [*range(100), *range(1000, 2000)]
    at = order.index(50)
    assert order[at : at + 2] == [50, 51]
    assert at < 1000, "the promoted read waited for the demand reads"
    assert order.index(1999) < order.index(49), "the other prefetch reads did not wait"


def test_only_chosen_prefetch_reads_are_cancelled(queued):
    queued.cancel([97, 98, 1500, 7777])  # a demand read and a stranger are left alone
    done, failed = collect(queued, 1100)
    assert {f.ticket: f.code for f in failed} == {97: errno.ECANCELED, 98: errno.ECANCELED}
    assert sorted(done) == [*range(97), 99, *range(1000, 2000)]
    assert queued.counters().errors == 0


def test_promoting_and_cancelling_while_reading_reports_each_ticket_once(reader, file):
    fd = reader.open(file, True)
    data = file.read_bytes()
    rng = np.random.default_rng(5)
    for _ in range(20):
        extents = [(int(offset), 40_000) for offset in rng.integers(0, SIZE - 40_000, 60)]
        memory = allocate(sum(area_nbytes(nbytes) for _, nbytes in extents))
        reader.attach(memory)
        batch = place(fd, extents, memory)
        batch[:, TICKET] = np.arange(60) // 2  # two ranges a ticket
        reader.submit(batch[:40], prefetch=True)
        reader.submit(batch[40:])
        cancelled = set()
        for _ in range(10):
            chosen = rng.permutation(30)[:3].tolist()
            if rng.random() < 0.5:
                reader.promote(chosen)
            else:
                reader.cancel(chosen)
                cancelled |= set(chosen)
        done, failed = collect(reader, 30)
        assert sorted(done + [f.ticket for f in failed]) == list(range(30))
        assert {f.ticket for f in failed} <= cancelled & set(range(20))
        for row, (offset, nbytes) in zip(batch.tolist(), extents, strict=True):
            start = row[DEST] - memory.ctypes.data
            if row[TICKET] in done:
                assert memory[start : start + nbytes].tobytes() == data[offset : offset + nbytes]
        reader.detach(memory)
