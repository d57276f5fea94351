"""Damaged headers: a named error or a parse whose extents lie inside the file; nothing else, and never slow."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestream.checkpoint.index import open_checkpoint
from moestream.checkpoint.safetensors import read_header
from moestream.errors import CheckpointError

HEADER = {
    "__metadata__": {"format": "mlx"},
    "model.layers.0.mlp.gate.weight": {"dtype": "U32", "shape": [4, 8], "data_offsets": [0, 128]},
    "model.layers.0.mlp.gate.scales": {"dtype": "BF16", "shape": [4, 1], "data_offsets": [128, 136]},
    "é": {"dtype": "F4", "shape": [2, 2], "data_offsets": [136, 138]},
}
TEXT = json.dumps(HEADER, separators=(",", ":")).encode()
FILE = len(TEXT).to_bytes(8, "little") + TEXT + bytes(138)
INDEX = json.dumps({"weight_map": {name: "a.safetensors" for name in HEADER if name[0] != "_"}}).encode()

# Bytes that keep JSON valid more often than random ones do.
TEMPTING = st.sampled_from([b"0", b"9", b"-", b"1e9", b".", b",", b"]", b"[", b"}", b"{", b'"', b":", b"null", b"\xff"])


@st.composite
def damaged(draw, original):
    raw = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        match draw(st.sampled_from(["flip", "set", "insert", "delete", "truncate", "append"])):
            case "flip" if raw:
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if raw:
                raw[at : at + 1] = draw(TEMPTING | st.binary(min_size=1, max_size=1))
            case "insert":
                raw[at:at] = draw(TEMPTING | st.binary(min_size=1, max_size=9))
            case "delete":
                del raw[at : at + draw(st.integers(1, 9))]
            case "truncate":
                del raw[at:]
            case "append":
                raw += draw(st.binary(min_size=1, max_size=9))
    return bytes(raw)


@st.composite
def rewritten(draw):
    """A header that is valid JSON with some values replaced, so that the checks behind the parser are reached."""
    values = st.none() | st.booleans() | st.integers(-3, 200) | st.integers() | st.floats() | st.text(max_size=3)
    values |= st.lists(st.integers(-2, 140), max_size=3) | st.sampled_from(["BF16", "U8", "F4", "F6_E2M3", "F32"])
    header = json.loads(TEXT)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(list(header)))
        if isinstance(header[name], dict) and header[name] and draw(st.integers(0, 4)):
            header[name][draw(st.sampled_from(list(header[name])))] = draw(values)
        else:
            header[name] = draw(values)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(draw(st.sampled_from([138, 138, 0, 137, 1000])))


def attempt(function, argument):
    """The result, or the error raised on purpose; every other exception fails the test."""
    try:
        return function(argument)
    except CheckpointError as error:
        return error


def parse_within_bounds(path, raw):
    path.write_bytes(raw)
    begun = time.thread_time()  # of this thread only, so a busy machine does not count
    found = attempt(read_header, path)
    assert time.thread_time() - begun < 1
    if isinstance(found, CheckpointError):
        assert str(path) in str(found)
        assert str(found).isprintable()
        return
    for entry in found.tensors.values():
        assert entry.offset >= 8
        assert entry.offset + entry.nbytes <= len(raw)
    assert sum(entry.nbytes for entry in found.tensors.values()) <= len(raw)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


def test_the_undamaged_file_parses(path):
    path.write_bytes(FILE)
    assert set(read_header(path).tensors) == set(HEADER) - {"__metadata__"}


@settings(max_examples=500, deadline=None)
@given(raw=damaged(FILE))
def test_damaged_bytes(path, raw):
    parse_within_bounds(path, raw)


@settings(max_examples=400, deadline=None)
@given(raw=rewritten())
def test_replaced_values(path, raw):
    parse_within_bounds(path, raw)


@settings(max_examples=150, deadline=None)
@given(text=damaged(TEXT))
def test_damaged_text_under_a_true_length(path, text):
    parse_within_bounds(path, len(text).to_bytes(8, "little") + text + bytes(138))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_json_files(tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / "folder"
    folder.mkdir(exist_ok=True)
    original = {
        "config.json": b'{"quantization": {"group_size": 64, "bits": 4, "a.b": {"group_size": 32, "bits": 8}}}',
        "model.safetensors.index.json": INDEX,
    }
    for file, content in original.items():
        (folder / file).write_bytes(data.draw(damaged(content)) if file == name else content)
    (folder / "a.safetensors").write_bytes(FILE)
    found = attempt(open_checkpoint, folder)
    if isinstance(found, CheckpointError):
        assert str(folder) in str(found)
        assert str(found).isprintable()
    else:
        assert found.files == (folder / "a.safetensors",)
