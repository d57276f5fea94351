"""The pure parts of benchmarks/flash_moe: arithmetic, predictions, requantised checkpoints."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import FOLDER

from moestream.checkpoint.encoding import Encoding
from moestream.checkpoint.index import open_checkpoint
from moestream.checkpoint.quant import encode
from moestream.checkpoint.safetensors import pread_exact
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "flash_moe"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """A loader of the scripts, which import each other by their plain names."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module
    sys.path.remove(str(SCRIPTS))
    for name in set(sys.modules) - before:  # plain names, which other scripts may have too
        if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_every_second_round_goes_backwards(scripts: Any) -> None:
    common = scripts("common")
    order: list[str] = []
    results = common.interleave({n: lambda n=n: order.append(n) or len(order) for n in "abc"}, 2)
    assert "".join(order) == "abccba"
    assert results == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}


def test_ratios_are_taken_within_a_round(scripts: Any) -> None:
    # The machine became ten times slower after the first round; b is always twice a.
    rates = {"a": [10.0, 1.0, 1.0], "b": [20.0, 2.0, 2.0]}
    assert scripts("common").paired(rates, "b", "a") == 2.0


def test_kernel_lines_are_grouped_by_name(scripts: Any) -> None:
    assert scripts("dequantise_kernels").parse("naive 1.5\nfactored 3\nnaive 2.5\n") == {
        "naive": [1.5, 2.5],
        "factored": [3.0],
    }


@pytest.mark.parametrize(
    ("ratio", "unpack", "overlapped", "expected"),
    [
        (0.5, 100.0, True, 2.0),  # the disk is what waits
        (0.5, 2.0, True, 1.0),  # unpacking is as slow as the disk
        (0.5, 2.0, False, 2 / 3),  # and comes on top
        (1.0, 4.0, False, 2 / 3),
    ],
)
def test_what_compression_does_to_reading(
    scripts: Any, ratio: float, unpack: float, overlapped: bool, expected: float
) -> None:
    assert scripts("compression").speedup(ratio, unpack, 2.0, overlapped) == pytest.approx(expected)


def test_calls_are_found_and_judged(scripts: Any) -> None:
    texts = scripts("texts")
    good = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert texts.calls_in(f"{good}\n{good}") == [{"name": "f", "arguments": {}}] * 2
    assert texts.calls_in("None of my tools can do that.") == []
    assert texts.calls_in(good.replace('"', "\\")) is None  # what 2 bits are said to write
    assert texts.calls_in("<tool_call>\n{}") is None
    assert texts.well_formed([])
    assert not texts.well_formed([{"name": "f"}])


def test_log_softmax_and_judged_rows(scripts: Any) -> None:
    logits = np.array([[0, 0], [1000, 0], [0, 3]], np.float32)
    quality = scripts("quality")
    assert np.allclose(np.exp(quality.log_softmax(logits)).sum(axis=1), 1)
    assert np.array_equal(quality.judged(logits, 2), quality.log_softmax(logits)[1:2])


def test_recall_of_the_last_token_and_of_logits(scripts: Any) -> None:
    routing = scripts("routing")
    chosen = np.array([[0, 1], [1, 2], [5, 6]], np.int32)
    logits = np.zeros((3, 8), np.float32)
    logits[[0, 1, 2], [0, 1, 5]] = 2.0
    logits[[0, 1, 2], [1, 3, 7]] = 1.0
    assert routing.prediction([chosen], None, (1, 2)) == {1: 0.0, 2: 0.25}
    assert routing.prediction([chosen], [logits], (1, 2)) == {1: 0.5, 2: pytest.approx(4 / 6)}


def test_prefetch_is_judged_by_what_the_cache_lacks(scripts: Any) -> None:
    chosen = [[np.array([[0, 1], [2, 3], [0, 1], [2, 3]], np.int32)]]
    routing = scripts("routing")
    last = routing.covered_misses(chosen, None, 8, 1.0)  # everything stays: the token before is always cached
    assert last == {"covered": 0.0, "used": 0.0, "misses": 4}
    perfect = routing.covered_misses(chosen, chosen, 8, 1.0)
    assert perfect == {"covered": 1.0, "used": 1.0, "misses": 4}


def test_a_trace_can_be_guessed_ahead(scripts: Any) -> None:
    decode = scripts("decode_variants")
    right, wrong = decode.Routing(64, 4, 2, recall=1.0), decode.Routing(64, 4, 2, recall=0.0)
    for _ in range(5):
        guess = right.early(1, 1)
        assert np.array_equal(guess, right.ids(1, 1))
        assert np.array_equal(right.temporal(1, 1), guess)
        truth = (wrong.early(1, 1), wrong.ids(1, 1))[1]
        assert np.array_equal(truth, guess)  # guessing does not change the trace


def test_requantised_checkpoint_has_other_experts_and_nothing_else(scripts: Any, tmp_path: Path) -> None:
    source = FOLDER / "qwen3_5-mlx4"
    group = open_checkpoint(source).config["quantization"]["group_size"]
    errors = scripts("requantise").write_requantised(source, tmp_path, 2, group)
    assert min(errors.values()) > 0.05
    assert max(errors.values()) < 1
    old, new = open_checkpoint(source), open_checkpoint(tmp_path)
    assert set(old.tensors) == set(new.tensors)
    for name in old.tensors:
        if "switch_mlp" not in name:
            assert _bytes(old, name) == _bytes(new, name), name
    config, names = parse_config(new.config)
    for table in map_weights(new, config, names).experts.values():
        assert [m.encoding.bits for m in table.layout.matrices] == [2, 2, 2]


def test_requantising_to_more_bits_loses_little(scripts: Any) -> None:
    values = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    four, eight = Encoding("affine", 4, 64), Encoding("affine", 8, 64)
    _, error = scripts("requantise").requantise(encode(values, four), 4, 128, four, eight)
    assert np.abs(error).max() < 0.03


def _bytes(checkpoint: Any, name: str) -> bytes:
    entry = checkpoint.tensors[name]
    return bytes(pread_exact(checkpoint.files[entry.file], entry.offset, entry.nbytes))
