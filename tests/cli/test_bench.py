"""bench: the numbers fit together, and what it writes is written once."""

from __future__ import annotations

import importlib.util
import json

import pytest
from golden_models import FOLDER

from moestream.bench.ceilings import ComputeRates
from moestream.bench.demand import token_demand
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
    assert 0 < prefill["reads_per_expert"] <= 1
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
    nothing = json.loads(second.stdout)["decode"]
    assert nothing["hit_rate"] == 0  # without a cache every expert is read again
    assert nothing["bytes_read_per_token"] > decode["bytes_read_per_token"]


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
