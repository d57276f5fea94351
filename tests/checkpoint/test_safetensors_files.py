"""Headers from strangers: each way of being wrong has its own message. Then the writer."""

import json
import os

import numpy as np
import pytest
from checkpoint_build import raw_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from moestream.checkpoint.safetensors import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    STAGE_BYTES,
    NewTensor,
    pread_exact,
    read_header,
    write_safetensors,
)
from moestream.errors import CheckpointError, HeaderError, ReadError, TensorError


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def without(field):
    info = entry()
    del info[field]
    return info


WRONG = {
    "empty": (b"", HeaderError, "0 bytes are too few"),
    "seven bytes": (b"\0" * 7, HeaderError, "7 bytes are too few"),
    "length over limit": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        HeaderError,
        "header length 100000001 exceeds the limit",
    ),
    "length 2^64-1": (b"\xff" * 8 + b"{}", HeaderError, "header length 18446744073709551615 exceeds the limit"),
    "length over file": ((50).to_bytes(8, "little") + b"{}", HeaderError, "header of 50 bytes runs past the end"),
    "zero length": ((0).to_bytes(8, "little"), HeaderError, "header: not valid JSON"),
    "not json": (raw_safetensors("{"), HeaderError, "header: not valid JSON"),
    "not utf-8": (raw_safetensors(b'{"\xff": 1}'), HeaderError, "header: not valid UTF-8 at byte 2"),
    "a list": (raw_safetensors("[]"), HeaderError, "header: must be a JSON object, is list"),
    "deep nesting": (raw_safetensors("[" * 100_000), HeaderError, "header: not valid JSON"),
    "endless integer": (raw_safetensors('{"t": ' + "9" * 5000 + "}"), HeaderError, "header: not valid JSON"),
    "duplicate tensor": (
        raw_safetensors('{"t": ' + json.dumps(entry()) + ', "t": ' + json.dumps(entry()) + "}", b"\0" * 8),
        HeaderError,
        "duplicate key 't'",
    ),
    "duplicate field": (
        raw_safetensors('{"t": {"dtype": "F32", "shape": [2], "shape": [3], "data_offsets": [0, 8]}}', b"\0" * 8),
        HeaderError,
        "duplicate key 'shape'",
    ),
    "metadata": (raw_safetensors({"__metadata__": {"format": 1}}), HeaderError, "__metadata__ must be an object of"),
    "metadata list": (raw_safetensors({"__metadata__": []}), HeaderError, "__metadata__ must be an object of"),
    "lone surrogate": (raw_safetensors('{"\\ud800": {}}'), HeaderError, r"'\\ud800' holds unprintable"),
    "escape codes": (raw_safetensors('{"\\u001b[2J": {}}'), HeaderError, "holds unprintable characters"),
    "not an object": (raw_safetensors({"t": 3}), HeaderError, "tensor 't' must be an object, is int"),
    "no dtype": (raw_safetensors({"t": without("dtype")}), HeaderError, "tensor 't': field 'dtype' is missing"),
    "no shape": (raw_safetensors({"t": without("shape")}), HeaderError, "tensor 't': field 'shape' is missing"),
    "no offsets": (raw_safetensors({"t": without("data_offsets")}), HeaderError, "field 'data_offsets' is missing"),
    "unknown dtype": (raw_safetensors({"t": entry("F33")}), TensorError, "tensor 't': unknown dtype 'F33'"),
    "dtype list": (raw_safetensors({"t": entry(["F32"])}), TensorError, "unknown dtype"),
    "negative shape": (raw_safetensors({"t": entry(shape=(-2,))}), TensorError, r"shape \[-2\] is not a list of non-"),
    "float shape": (raw_safetensors({"t": entry(shape=(2.0,))}), TensorError, r"shape \[2.0\] is not a list of non-"),
    "bool shape": (raw_safetensors({"t": entry(shape=(True,))}), TensorError, r"shape \[True\] is not a list of non-"),
    "shape number": (
        raw_safetensors('{"t": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}'),
        TensorError,
        "shape 2 is not a list",
    ),
    "overflowing shape": (
        raw_safetensors({"t": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}),
        TensorError,
        "overflows 64 bits",
    ),
    "one offset": (raw_safetensors({"t": entry(offsets=(0,))}), TensorError, r"data_offsets \[0\] are not two"),
    "negative offset": (raw_safetensors({"t": entry(offsets=(-8, 0))}), TensorError, r"\[-8, 0\] are not two"),
    "begin after end": (raw_safetensors({"t": entry(offsets=(8, 0))}), TensorError, "begin after they end"),
    "past the end": (raw_safetensors({"t": entry()}, b"\0" * 7), TensorError, r"'t': data_offsets \[0, 8\] end past"),
    "offset 2^64": (raw_safetensors({"t": entry(offsets=(0, 2**64))}), TensorError, "end past the end of the file"),
    "size": (raw_safetensors({"t": entry(shape=(3,))}, b"\0" * 8), TensorError, r"F32 needs 12 bytes, .* hold 8"),
    "half a byte": (raw_safetensors({"t": entry("F4", (3,), (0, 1))}, b"\0"), TensorError, "F4 needs 1.5 bytes"),
    "overlap": (
        raw_safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
        HeaderError,
        "tensors 'a' and 'b' overlap",
    ),
    "hole at start": (
        raw_safetensors({"a": entry(offsets=(4, 12))}, b"\0" * 12),
        HeaderError,
        "4 bytes between the header and 'a' have no tensor",
    ),
    "hole between": (
        raw_safetensors({"a": entry(), "b": entry(offsets=(9, 17))}, b"\0" * 17),
        HeaderError,
        "1 bytes between 'a' and 'b' have no tensor",
    ),
    "trailing": (raw_safetensors({"a": entry()}, b"\0" * 9), HeaderError, "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_headers(case, tmp_path):
    raw, error, message = WRONG[case]
    path = tmp_path / "shard.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"gone": "No such file", "pipe": "not a regular file", ".": "not a regular file"}.items():
        with pytest.raises(CheckpointError, match=message):
            read_header(tmp_path / name)


def test_good_header(tmp_path):
    path = tmp_path / "x.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry("BF16", (2, 3), (4, 16)),
        "empty": entry("F32", (0, 5), (4, 4)),
        "scalar": entry("F32", (), (0, 4)),
        "fp4": {**entry("F4", (4,), (16, 18)), "extra": 1},
    }
    raw = raw_safetensors(header, b"\0" * 18)
    path.write_bytes(raw)
    found = read_header(path, file=7)
    assert found.metadata == {"format": "pt"}
    start = len(raw) - 18
    assert {t.name: (t.dtype, t.shape, t.offset - start, t.nbytes, t.file) for t in found.tensors.values()} == {
        "b": ("BF16", (2, 3), 4, 12, 7),
        "empty": ("F32", (0, 5), 4, 0, 7),
        "scalar": ("F32", (), 0, 4, 7),
        "fp4": ("F4", (4,), 16, 2, 7),
    }
    assert found.tensors["b"].extent.offset == start + 4


def test_header_limit_is_inclusive(tmp_path):
    """A header of exactly the limit may not be refused for its length (this one is a sparse file of NULs: bad JSON)."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(MAX_HEADER_BYTES.to_bytes(8, "little"))
        file.truncate(8 + MAX_HEADER_BYTES)
    with pytest.raises(HeaderError, match="not valid JSON"):
        read_header(path)


def test_pread_exact(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(range(10)))
    assert pread_exact(path, 3, 4) == bytes([3, 4, 5, 6])
    with pytest.raises(ReadError, match=r"x: file ends after 3 of 9 bytes at offset 7"):
        pread_exact(path, 7, 9)
    with pytest.raises(ReadError, match=r"gone: reading 1 bytes at offset 0 failed.*No such file"):
        pread_exact(tmp_path / "gone", 0, 1)


@pytest.mark.parametrize("align", [1, 8, 4096])
def test_writer_round_trip(tmp_path, align):
    path = tmp_path / "x.safetensors"
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = np.arange(100, dtype=np.uint8)
    tensors = [
        NewTensor("a", "F32", a.shape, [a]),
        NewTensor("b", "U8", b.shape, (b[i : i + 30] for i in range(0, 100, 30))),
        NewTensor("none", "BF16", (0,), []),
    ]
    write_safetensors(path, tensors, {"format": "mlx"}, align)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    found = read_header(path)
    assert found.metadata == {"format": "mlx"}
    assert list(found.tensors) == ["a", "b", "none"]
    assert found.tensors["a"].offset % align == 0
    for name, want in {"a": a.tobytes(), "b": b.tobytes(), "none": b""}.items():
        t = found.tensors[name]
        assert pread_exact(path, t.offset, t.nbytes) == want


def test_large_file_in_odd_pieces(tmp_path):
    """Across the stages of direct writing, with an odd tail."""
    path = tmp_path / "x.safetensors"
    data = np.random.default_rng(0).integers(0, 256, 2 * STAGE_BYTES + 12345, dtype=np.uint8)
    pieces = np.split(data, [1, 5000, STAGE_BYTES - 1, STAGE_BYTES + 3])
    write_safetensors(path, [NewTensor("x", "U8", data.shape, pieces)], align=1)
    found = read_header(path).tensors["x"]
    assert (np.frombuffer(pread_exact(path, found.offset, found.nbytes), np.uint8) == data).all()


def test_writer_leaves_nothing_behind(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="tensor 'a': 3 bytes given, 4 expected"):
        write_safetensors(path, [NewTensor("a", "U8", (4,), [b"abc"])])
    with pytest.raises(ValueError, match="given twice"):
        write_safetensors(path, [NewTensor("a", "U8", (1,), [b"a"])] * 2)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == b"old"


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
byte_dtypes = st.sampled_from([d for d, bits in DTYPE_BITS.items() if bits % 8 == 0])


@settings(max_examples=60, deadline=None)
@given(specs=st.dictionaries(st.text("abcé._0 ", min_size=1, max_size=8), st.tuples(byte_dtypes, shapes), max_size=6))
def test_any_file_we_write_reads_back(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    tensors = []
    for i, (name, (dtype, shape)) in enumerate(specs.items()):
        tensor = NewTensor(name, dtype, shape, [])
        tensors.append(NewTensor(name, dtype, shape, [bytes([i]) * tensor.nbytes]))
    write_safetensors(path, tensors)
    found = read_header(path).tensors
    assert {t.name: (t.dtype, t.shape) for t in found.values()} == specs
    for i, name in enumerate(specs):
        assert pread_exact(path, found[name].offset, found[name].nbytes) == bytes([i]) * found[name].nbytes
