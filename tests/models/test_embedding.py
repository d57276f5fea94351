"""An embedding table on disk gives the rows that it would give in memory, or says whose it could not read."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from golden_models import GREEDY, PROMPTS, Golden, golden, run_chunked
from test_memory_plan import planned

from moestream.checkpoint.encoding import Encoding, Extent, MatrixLayout, MatrixSpec
from moestream.checkpoint.quant import encode
from moestream.config import RunConfig
from moestream.engine.load import load_runtime
from moestream.engine.sampling import SamplingParams
from moestream.errors import ReadError
from moestream.models.batch import Batch
from moestream.models.embedding import TableOnDisk
from moestream.ops.base import Ops
from moestream.ops.reference import ReferenceOps

VOCAB, HIDDEN = 50, 64
ENCODINGS = [Encoding("affine", bits, 32, "bf16") for bits in (2, 3, 4, 6, 8)]
ENCODINGS += [Encoding(kind) for kind in ("bf16", "f16", "f32")]


class NoStates:
    length = 0


def batch_of(ids) -> Batch:
    return Batch.of([(np.array(ids, np.int32), NoStates())])


@pytest.fixture
def stored(tmp_path):
    """Writes a random table: its spec, files and parts."""

    def write(encoding: Encoding):
        parts = encode(np.random.default_rng(0).standard_normal((VOCAB, HIDDEN), np.float32), encoding)
        files, extents = [tmp_path / "a.bin", tmp_path / "b.bin"], []
        sizes = [0, 0]
        for i, part in enumerate(parts):
            file, gap = i % 2, b"x" * (13 + i)
            with files[file].open("ab") as out:
                out.write(gap + part.tobytes())
            extents.append(Extent(file, sizes[file] + len(gap), part.nbytes))
            sizes[file] += len(gap) + part.nbytes
        return MatrixSpec("embed", MatrixLayout(VOCAB, HIDDEN, encoding), tuple(extents)), files, parts

    return write


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.name)
def test_rows_are_those_of_the_table(stored, encoding: Encoding, exact_ops: Ops) -> None:
    spec, files, parts = stored(encoding)
    for ops in (exact_ops, ReferenceOps()):
        table, whole = TableOnDisk(spec, files, ops), ops.matrix(spec.layout, parts)
        for ids in ([0], [VOCAB - 1], [7, 3, 7, 7, 0, 49, 3], list(range(VOCAB)) * 3):
            batch = batch_of(ids)
            np.testing.assert_array_equal(table(batch), ops.embed(batch.ids, whole))
            assert batch.failures == []


def test_a_row_that_cannot_be_read_fails_who_needs_it(stored, monkeypatch) -> None:
    spec, files, parts = stored(ENCODINGS[2])
    ops = ReferenceOps()
    table = TableOnDisk(spec, files, ops)
    bad = spec.parts[1].offset + 9 * spec.parts[1].nbytes // VOCAB
    read, tries = os.pread, []

    def pread(descriptor, nbytes, offset):
        if offset == bad:
            tries.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, nbytes, offset)

    monkeypatch.setattr(os, "pread", pread)
    batch = batch_of([4, 9, 5, 9])
    rows = table(batch)
    assert [row for row, _ in batch.failures] == [1, 3]
    assert len(tries) == 2
    error = batch.failures[0][1]
    assert isinstance(error, ReadError)
    assert str(error) == f"{files[1]}: cannot read at offset {bad}: Input/output error"
    whole = ops.matrix(spec.layout, parts)
    np.testing.assert_array_equal(rows[[0, 2]], ops.embed(np.array([4, 5], np.int32), whole))


def test_passing_errors_and_short_reads_cost_nothing(stored, monkeypatch) -> None:
    spec, files, parts = stored(ENCODINGS[2])
    ops = ReferenceOps()
    table, read, failed = TableOnDisk(spec, files, ops), os.pread, set()

    def pread(descriptor, nbytes, offset):
        if (descriptor, offset) not in failed:
            failed.add((descriptor, offset))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, min(nbytes, 3), offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr("moestream.models.embedding.TRIES", 100)
    batch = batch_of([4, 9])
    np.testing.assert_array_equal(table(batch), ops.embed(batch.ids, ops.matrix(spec.layout, parts)))
    assert batch.failures == []


def test_a_truncated_file_is_named(stored) -> None:
    spec, files, _ = stored(ENCODINGS[2])
    table = TableOnDisk(spec, files, ReferenceOps())
    size = files[0].stat().st_size - 2
    os.truncate(files[0], size)
    batch = batch_of([VOCAB - 1, 0])
    table(batch)
    assert [row for row, _ in batch.failures] == [0]
    assert f"{files[0]}: cannot read at offset {size}: the file ends there ({size} bytes)" in str(batch.failures[0][1])
    with pytest.raises(ReadError, match=r"gone\.bin: cannot open: No such file"):
        TableOnDisk(spec, [files[0], files[1].with_name("gone.bin")], ReferenceOps())


def test_files_are_closed_with_the_table(stored) -> None:
    spec, files, _ = stored(ENCODINGS[2])
    table = TableOnDisk(spec, files, ReferenceOps())
    descriptors = [descriptor for descriptor, _ in table._files.values()]
    del table
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.parametrize("tiny", ["qwen3-f16-single", "qwen3-mlx4", "qwen3_5-mlx4"], indirect=True)
def test_a_model_computes_the_same(tiny: Golden, exact_ops: Ops) -> None:
    ids = tiny.ids(0)
    chunks = [len(ids) - 4, 1, 1, 2]
    expected, actual = (run_chunked(tiny.model(exact_ops, embed_on_disk=on), ids, chunks) for on in (False, True))
    np.testing.assert_array_equal(actual, expected)


def test_the_table_stays_on_disk_where_experts_are_streamed() -> None:
    tiny = golden("qwen3_5-mlx4")
    run = RunConfig(max_batch=1, context=64)
    everything = planned(tiny, run)
    assert not everything.embed_on_disk
    less = everything.fixed + everything.arena // 2 + (8 << 20)
    runtime = load_runtime(tiny.folder, RunConfig(max_batch=1, context=256, cache="none"))
    assert runtime.plan.embed_on_disk
    assert planned(tiny, run, less, everything.experts // 2).embed_on_disk
    try:
        params = SamplingParams(temperature=0, max_tokens=GREEDY, ignore_eos=True)
        for p in PROMPTS:
            sequence = runtime.engine.add(tiny.ids(p)[:-GREEDY], params)
            while not runtime.engine.idle:
                runtime.engine.step()
            assert sequence.error is None
            assert len(sequence.tokens) == GREEDY
    finally:
        runtime.close()


def test_an_unreadable_row_ends_its_request_only(monkeypatch) -> None:
    tiny = golden("qwen3-f16-single")
    runtime = load_runtime(tiny.folder, RunConfig(max_batch=2, context=256, cache="none"))
    read = TableOnDisk._read

    def fail(table, extent, token, row):
        if token == 11:
            raise ReadError("nothing at 11")
        read(table, extent, token, row)

    monkeypatch.setattr(TableOnDisk, "_read", fail)
    try:
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        bad, good = (runtime.engine.add(ids, params) for ids in ([5, 11, 7], [5, 6, 7]))
        while not runtime.engine.idle:
            runtime.engine.step()
    finally:
        runtime.close()
    assert str(bad.error) == "nothing at 11"
    assert good.error is None
    assert len(good.tokens) == 1
