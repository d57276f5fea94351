"""Traces: a file gives back what was written, a damaged one a clear error, and a replay what the store would do."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestream.checkpoint.safetensors import NewTensor, read_header, write_safetensors
from moestream.errors import CheckpointError, ConfigError, TensorError
from moestream.experts.policy import LFRU, LRU, belady, simulate
from moestream.experts.trace import Trace, load_trace, replay, synthetic_trace

E, K, LAYERS = 6, 2, (1, 3)


def small(experts=E, seed=0) -> Trace:
    """A prompt of 5 and one of 3 tokens read together in two sweeps, then both decoded, then one alone."""
    rng = np.random.default_rng(seed)
    segments = [(0, 0, 4, 1), (1, 0, 1, 1), (1, 1, 3, 1), (2, 0, 1, 0), (2, 1, 1, 0), (3, 1, 1, 0)]
    rows = sum(s[2] for s in segments)
    ids = rng.random((rows, len(LAYERS), experts)).argsort(axis=2)[:, :, :K].astype(np.uint16)
    tokens = rng.integers(0, 99, rows).astype(np.int32)
    return Trace("a model", experts, LAYERS, ids, tokens, np.array(segments, np.int32))


@pytest.mark.parametrize(("experts", "dtype"), [(6, "U8"), (256, "U8"), (257, "U16"), (40000, "U16")])
def test_a_file_gives_back_the_trace(tmp_path, experts, dtype):
    path, trace = tmp_path / "t.safetensors", small(experts)
    trace.save(path)
    assert read_header(path).tensors["ids"].dtype == dtype
    read = load_trace(path)
    assert (read.model, read.experts, read.layers, read.steps) == ("a model", experts, LAYERS, 4)
    for name in ("ids", "tokens", "segments"):
        np.testing.assert_array_equal(getattr(read, name), getattr(trace, name))


def test_an_empty_trace_can_be_written_and_replayed(tmp_path):
    none = Trace("m", E, LAYERS, np.empty((0, 2, K), np.uint8), np.empty(0, np.int32), np.empty((0, 4), np.int32))
    none.save(tmp_path / "t")
    outcomes = replay(load_trace(tmp_path / "t"), ["lru"], [4])
    assert [(o.policy, o.misses) for o in outcomes] == [("lru", 0), ("belady", 0)]


def test_requests_are_the_distinct_experts_of_each_layer_and_step():
    trace = small()
    requests = trace.requests()
    assert len(requests) == trace.steps * len(LAYERS)
    starts = np.concatenate([[0], np.cumsum(np.bincount(trace.segments[:, 0], trace.segments[:, 2]))]).astype(int)
    for i, request in enumerate(requests):
        step, layer = divmod(i, len(LAYERS))
        chosen = trace.ids[starts[step] : starts[step + 1], layer].ravel().tolist()
        keys = sorted({layer * E + e for e in chosen})
        assert (request.layer, request.keys, request.rows) == (layer, keys, starts[step + 1] - starts[step])
        assert list(request.counts) == [chosen.count(key - layer * E) for key in keys]
    assert trace.reply_steps().tolist() == [False, False, True, True]


def test_a_replay_is_what_the_policies_do():
    trace = synthetic_trace(experts=32, active=4, layers=2, tokens=150, prompt_tokens=40, prefill_chunk=16)
    requests, sizes = trace.requests(), [8, 24]
    for outcome in replay(trace, ["lru", "lfru:4"], sizes):
        layer_of, reserve = trace.layer_of_key, outcome.slots // 4
        expected = {
            "lru": lambda n: simulate(LRU(n, layer_of, reserve), requests),  # noqa: B023
            "lfru:4": lambda n: simulate(LFRU(n, layer_of, reserve, 4.0), requests),  # noqa: B023
            "belady": lambda n: belady(requests, n),
        }[outcome.policy](outcome.slots)
        assert outcome.hit_rate == expected.hit_rate
        assert outcome.misses == expected.requests - expected.hits
        assert 0 < outcome.reply_hit_rate < 1


def test_a_replay_keeps_as_many_slots_free_as_the_store_in_a_sweep():
    """A quarter of 200 slots stays free while a prompt is read; every sweep wants all 256 experts."""
    trace = synthetic_trace(experts=256, active=128, layers=1, tokens=1600, prompt_tokens=1600, prefill_chunk=400)
    assert replay(trace, ["lfru"], [200])[0].misses == 256 + (trace.steps - 1) * (256 - (200 - 50))


def test_reply_hits_are_those_of_steps_without_a_prompt():
    """A prompt brings every expert into a cache that holds them all: the reply then only hits."""
    trace = synthetic_trace(experts=8, active=4, layers=2, tokens=300, prompt_tokens=200, prefill_chunk=200)
    for outcome in replay(trace, ["lru", "lfru"], [16]):
        assert outcome.misses == 16
        assert outcome.reply_hit_rate == 1.0
        assert outcome.hit_rate < 1.0


@pytest.mark.parametrize("name", ["", "fifo", "lru:4", "lfru:", "lfru:0", "lfru:-1", "lfru:x", "belady"])
def test_unknown_policies_are_refused(name):
    with pytest.raises(ConfigError, match="choose from lru, lfru"):
        replay(small(), [name], [4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 3}, "names expert"),
        ({"experts": 1}, "do not fit"),
        ({"experts": 0}, "do not fit"),
        ({"experts": 65537}, "do not fit"),
        ({"layers": (0,)}, "do not fit 1 layers"),
        ({"ids": np.zeros((11, 2, K), np.uint8)}, "twice in one row"),
        ({"ids": np.zeros((11, 2), np.uint8)}, "holds ids"),
        ({"tokens": np.zeros(10, np.int32)}, "tokens has 10 rows"),
        ({"segments": np.zeros((2, 3), np.int32)}, "holds ids"),
        ({"segments": np.array([[0, 0, 10, 1]], np.int32)}, "cover 10 rows"),
        ({"segments": np.array([[0, 0, 12, 1], [1, 0, -1, 1]], np.int32)}, "cover 11 rows"),
        ({"segments": np.array([[1, 0, 11, 1]], np.int32)}, "without gaps"),
        ({"segments": np.array([[0, 0, 5, 1], [2, 0, 6, 1]], np.int32)}, "without gaps"),
        ({"segments": np.array([[0, 0, 11, 2]], np.int32)}, "last column"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    trace = small()
    fields = {name: getattr(trace, name) for name in ("model", "experts", "layers", "ids", "tokens", "segments")}
    with pytest.raises(TensorError, match=message):
        Trace(**(fields | changes))


def rewrite(path, *, metadata=None, drop=(), dtypes=None):
    """Write a trace's file again with some things wrong."""
    trace, header = small(), read_header(path)
    arrays = {"ids": trace.ids.astype(np.uint8), "tokens": trace.tokens, "segments": trace.segments}
    tensors = [
        NewTensor(name, (dtypes or {}).get(name, header.tensors[name].dtype), array.shape, [array])
        for name, array in arrays.items()
        if name not in drop
    ]
    write_safetensors(path, tensors, {k: v for k, v in (header.metadata | (metadata or {})).items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"format": None}}, "is not a trace"),
        ({"metadata": {"format": "mlx"}}, "is not a trace"),
        ({"metadata": {"version": "2"}}, "version '2' .* not known"),
        ({"metadata": {"experts": None}}, "experts must be a number"),
        ({"metadata": {"experts": "1e3"}}, "experts must be a number"),
        ({"metadata": {"experts": "٣"}}, "experts must be a number"),
        ({"metadata": {"experts": "9" * 5000}}, "experts must be a number"),
        ({"metadata": {"layers": None}}, "layers must be a list"),
        ({"metadata": {"layers": '{"1": 3}'}}, "layers must be a list"),
        ({"metadata": {"layers": "[1, -3]"}}, "layers must be a list"),
        ({"metadata": {"layers": "[" * 9999}}, "layers must be a list"),
        ({"metadata": {"layers": "[1]"}}, "do not fit 1 layers"),
        ({"drop": ["tokens"]}, "tensor tokens must be there as I32"),
        ({"dtypes": {"segments": "F32"}}, "tensor segments must be there as I32"),
        ({"dtypes": {"ids": "I8"}}, "tensor ids must be there as U8 or U16"),
    ],
)
def test_malformed_files_are_named(tmp_path, changes, message):
    path = tmp_path / "t.safetensors"
    small().save(path)
    rewrite(path, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load_trace(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            load_trace(path)


@settings(max_examples=150)
@given(st.data())
def test_any_damage_gives_an_error_or_a_trace_that_replays(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    path = folder / "t"
    small().save(path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.integers(0, 9)) == 0:
            del raw[at:]
            break
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    trace = attempt(path)
    if isinstance(trace, CheckpointError):
        assert str(path) in str(trace)
    else:
        assert all(0 <= outcome.misses <= trace.ids.size for outcome in replay(trace, ["lfru"], [3]))
    shutil.rmtree(folder)


def attempt(path):
    """The trace, or the error raised on purpose; every other exception fails the test."""
    try:
        return load_trace(path)
    except CheckpointError as error:
        return error


def test_a_name_that_would_break_a_terminal_is_cleaned(tmp_path):
    path = tmp_path / "t"
    small().save(path)
    rewrite(path, metadata={"model": "evil\x1b[2J" + "x" * 999})
    name = load_trace(path).model
    assert name.isprintable()
    assert len(name) == 200


def test_a_trace_that_cannot_be_written_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        small().save(tmp_path / "no folder" / "t")


@pytest.mark.parametrize(
    "wrong",
    [
        {"active": 0},
        {"active": 7},
        {"experts": 70000},
        {"layers": 0},
        {"tokens": 0},
        {"prompt_tokens": 20},
        {"prefill_chunk": 0},
    ],
)
def test_synthetic_traces_refuse_impossible_shapes(wrong):
    with pytest.raises(ConfigError, match="must"):
        synthetic_trace(**({"experts": 6, "active": 2, "layers": 1, "tokens": 10} | wrong))


def test_the_calibrated_trace_hits_as_published():
    """An LRU of 1/8 of 512 experts hits 67 %, one of 1/4 81 % (less the 16 slots for reads under way)."""
    trace = synthetic_trace(layers=2, tokens=1500)
    first, second = replay(trace, ["lru"], [128 + 16, 256 + 16])[:2]
    assert first.hit_rate == pytest.approx(0.67, abs=0.03)
    assert second.hit_rate == pytest.approx(0.81, abs=0.03)
