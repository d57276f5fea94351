"""bench: the numbers fit together, and what it writes is written once."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from golden_models import FOLDER

from moestream.bench.ceilings import ComputeRates
from moestream.bench.checkpoints import repeated
from moestream.bench.demand import token_demand
from moestream.bench.measure import CountingReader
from moestream.bench.report import floor_seconds
from moestream.checkpoint.index import open_checkpoint
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights

needs_native = pytest.mark.skipif(
    importlib.util.find_spec("moestream._native") is None, reason="the probes are native code"
)
SHORT = ("--prefill-chunk", 16, "--prompt-tokens", 24, "--new-tokens", 6, "--warmup", 8, "--ram", "400MB")


@needs_native
def test_synthetic_bench_is_consistent_and_reuses_its_checkpoint(run, tmp_path):
    command = ("bench", "--synthetic", "tiny-qwen3.5", "--layers", 4, "--dir", tmp_path, *SHORT)
    first = run(*command)
    assert first.returncode == 0, first.stderr
    *text, last = first.stdout.strip().splitlines()
    assert text[0].startswith("machine")
    assert "wrote" in first.stderr
    facts = json.loads(last)
    assert min(facts["ceilings"][name] for name in ("disk_8mb", "memory", "int8", "fma")) > 0
    prefill, decode = facts["prefill"], facts["decode"]
    assert (prefill["tokens"], prefill["chunks"]) == (24, 2)
    assert prefill["each_expert_read_at_most_once"]
    assert prefill["most_reads_of_an_expert_in_a_chunk"] == 1
    assert 0 < prefill["experts_read"] <= prefill["experts_asked"]
    warm = facts["prefill_warm"]  # every expert fits into 400 MB
    assert (warm["tokens"], warm["experts_read"], warm["bytes_read"], warm["hit_rate"]) == (24, 0, 0, 1)
    assert decode["tokens"] == 6
    assert facts["warmup"] == 8
    floor = decode["floor_seconds"][decode["limit"]]
    assert decode["percent_of_limit"] == pytest.approx(100 * floor / decode["seconds"])
    assert facts["peak_rss"] <= 1.1 * 400e6

    written = (tmp_path / "tiny-qwen3.5-4layers" / "config.json").stat().st_mtime_ns
    second = run(*command, "--cache", "none", "--json-only")
    assert second.returncode == 0, second.stderr
    assert "wrote" not in second.stderr
    assert (tmp_path / "tiny-qwen3.5-4layers" / "config.json").stat().st_mtime_ns == written
    assert len(second.stdout.splitlines()) == 1
    uncached = json.loads(second.stdout)
    assert uncached["prefill_warm"] is None
    nothing = uncached["decode"]
    assert nothing["hit_rate"] == 0  # without a cache every expert is read again
    assert nothing["bytes_read_per_token"] > decode["bytes_read_per_token"]


@needs_native
def test_repeated_layers_are_layers_of_their_own(run, tmp_path):
    command = ("bench", "--synthetic", "tiny-qwen3.5", "--layers", 4, "--dir", tmp_path, *SHORT)
    once, twice = (json.loads(run(*command, "--json-only", "--repeat-layers", n).stdout) for n in (1, 2))
    assert twice["plan"]["experts"] == 2 * once["plan"]["experts"]
    assert twice["demand"]["expert_bytes"] == 2 * once["demand"]["expert_bytes"]
    read = [facts["prefill"]["bytes_read"] for facts in (once, twice)]
    assert read[1] == pytest.approx(2 * read[0], rel=0.1)


def test_a_repeated_checkpoint_computes_what_its_layers_do_twice(tiny):
    deep = repeated(tiny.checkpoint, 2)
    config, names = parse_config(deep.config)
    weights = map_weights(deep, config, names)
    half = len(config.layers) // 2
    assert 2 * half == len(config.layers)
    for first, second in zip(weights.layers[:half], weights.layers[half:], strict=True):
        assert [spec.parts for spec in first.mixer.matrices.values()] == [
            spec.parts for spec in second.mixer.matrices.values()
        ]
    for layer, table in weights.experts.items():
        assert np.array_equal(table.ranges, weights.experts[(layer + half) % len(config.layers)].ranges)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "name one model"),
        (["demo", "--synthetic", "tiny-qwen3"], 2, "name one model"),
        (["demo", "--layers", 2], 2, "--layers only applies to --synthetic"),
        (["--synthetic", "gpt-9"], 2, "unknown synthetic model 'gpt-9'"),
        (["/nowhere"], 1, "/nowhere is not a model folder"),
    ],
)
def test_bench_errors(run, args, status, message):
    result = run("bench", *args)
    assert result.returncode == status
    assert message in result.stderr


class Sink:
    """Takes every batch, as a reader that is infinitely fast."""

    def submit(self, ranges, prefetch=False):
        pass


def test_an_expert_read_twice_in_a_chunk_is_seen_whatever_the_average_says():
    reader = CountingReader(Sink())
    a, b = ([[0, offset, 64, 0, ticket], [0, offset + 64, 8, 0, ticket]] for offset, ticket in ((0, 7), (4096, 8)))
    reader.submit(np.array([*a, *b]))
    reader.submit(np.array([[*row[:4], 9] for row in b]))
    assert sorted(reader.take()) == [1, 2]
    reader.submit(np.array(b))  # the next chunk may read it again
    assert reader.take() == [1]
    assert reader.take() == []


def test_demand_counts_what_a_token_touches():
    checkpoint = open_checkpoint(FOLDER / "qwen3-f16-single")
    config, names = parse_config(checkpoint.config)
    weights = map_weights(checkpoint, config, names)
    demand = token_demand(config, weights, active=2)
    expert = 3 * 40 * 104
    assert demand.expert_bytes == 2 * 2 * expert * 2  # 2 layers, 2 experts, 2 bytes
    assert demand.dense_bytes < weights.dense_nbytes  # the embedding table is only looked up
    assert demand.flops == demand.touched  # bf16: two operations for two bytes
    assert demand.head_flops == 2 * config.vocab_size * config.hidden_size


def test_floor_is_the_slowest_resource():
    compute = ComputeRates(threads=2, memory=20.0, int8=100.0, fma=10.0)
    floors = floor_seconds(missed=10, touched=10, flops=10, disk=2.0, compute=compute, exact=False)
    assert floors == {"disk": 5.0, "memory": 0.5, "arithmetic": 0.1}
    assert floor_seconds(0, 0, 10, 2.0, compute, exact=True)["arithmetic"] == 1.0
