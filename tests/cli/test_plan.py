"""moestream plan: what it promises without loading, and what --measure tries, stores and leaves behind."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import time

import pytest
from golden_models import FOLDER

from moestream import system
from moestream.bench import tune as tuning
from moestream.bench.ceilings import ComputeRates, DiskRates
from moestream.bench.demand import Demand
from moestream.bench.outlook import expected_hit_rate, outlook, outlook_lines
from moestream.bench.tune import Candidate, candidates, choose, tune
from moestream.config import RunConfig
from moestream.plan import MemoryPlan

needs_native = pytest.mark.skipif(
    importlib.util.find_spec("moestream._native") is None, reason="--measure probes with native code"
)
PLAN = MemoryPlan(
    budget=10**9,
    baseline=0,
    dense=0,
    embed_on_disk=True,
    states=0,
    scratch=0,
    borrowed=0,
    prefixes=0,
    slot_nbytes=1000,
    slots=100,
    slots_minimum=4,
    experts=400,
    context=64,
    max_batch=1,
    token_nbytes=10**6,
    prefill_chunk=512,
)


@pytest.fixture
def plans(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESTREAM_PLANS", str(tmp_path / "plans"))
    return tmp_path / "plans"


def test_the_plan_is_shown_without_loading(run, model, plans):
    text = run("plan", model, "--ram", "300MB", "--no-probe")
    assert text.returncode == 0, text.stderr
    for word in ("memory", "slots: room for", "hit rate", "floor", "cliff", "a token", "a prompt", "measured"):
        assert word in text.stdout
    assert "ceilings" not in text.stdout  # nothing was probed
    facts = json.loads(run("plan", model, "--ram", "300MB", "--no-probe", "--json").stdout)
    assert facts["memory"]["total"] <= 300e6
    assert facts["cache"] == "arena"
    assert facts["stored"] is None


def test_ceilings_are_those_of_the_resource_that_needs_longest():
    disk, compute = DiskRates(True, 1e9, 2e9), ComputeRates(2, 40e9, 2e12, 1e11)
    demand = Demand(dense_bytes=10**9, expert_bytes=10**9, flops=4 * 10**9, head_flops=10**9)
    facts = outlook(PLAN, demand, 0.5, 512, 20 * 10**9, (disk, compute), exact=False)
    assert facts["missed_per_token"] == 0.5e9
    assert (facts["decode_limit"], facts["decode_ceiling_tok_s"]) == ("disk", pytest.approx(4))
    assert facts["read_per_chunk"] == 15e9  # all of the experts that 100 of 400 slots do not hold
    assert (facts["prefill_limit"], facts["prefill_ceiling_tok_s"]) == ("disk", pytest.approx(512 / 7.5))
    cached = outlook(PLAN, demand, 1.0, 512, 20 * 10**9, (disk, compute), exact=False)
    assert (cached["decode_limit"], cached["decode_ceiling_tok_s"]) == ("memory", pytest.approx(20))
    text = "\n".join(outlook_lines(cached, PLAN, floor=30, largest=200))
    assert "decode 20.0 tok/s (memory)" in text
    assert "above it" in text
    assert "borrows" not in text
    lending = dataclasses.replace(PLAN, borrowed=20_000)  # 20 of the 100 slots
    facts = outlook(lending, demand, 0.5, 512, 20 * 10**9, (disk, compute), exact=False)
    assert facts["read_per_chunk"] == 16e9
    assert "borrows 20.0 KB of the slots' memory" in "\n".join(outlook_lines(facts, lending, floor=30, largest=200))


@needs_native
def test_measuring_stores_a_plan_that_run_follows_until_it_is_forgotten(run, model, plans):
    measured = run("plan", model, "--measure", "--seconds", 2, "--ram", "300MB", "--context", 200)
    assert measured.returncode == 0, measured.stderr
    (file,) = plans.iterdir()
    assert str(file) in measured.stdout
    stored = json.loads(file.read_text())
    tried = {(c["cache"], c["slots"]): c for c in stored["measured"]["candidates"]}
    assert {cache for cache, _ in tried} == {"arena", "hybrid", "page"}
    assert all(t["tokens"] >= 3 and t["tok_s"] > 0 for c in tried.values() for t in c["turns"])
    assert (stored["cache"], stored["slots"]) in tried
    assert stored["ram"] <= 300e6
    followed = run("run", "hi", "--model", model, "--raw", "--max-tokens", 2, "--context", 200)
    assert followed.returncode == 0, followed.stderr
    assert f"Following the plan measured on {stored['date'][:10]}: {stored['cache']}" in followed.stderr
    shown = run("plan", model, "--no-probe", "--context", 200)
    assert "measured  " + stored["date"][:10] in shown.stdout
    ignored = run("run", "hi", "--model", model, "--raw", "--max-tokens", 2, "--context", 200, "--no-stored-plan")
    assert "Following" not in ignored.stderr
    assert "removed" in run("plan", model, "--forget").stdout
    assert list(plans.iterdir()) == []


@needs_native
def test_an_interrupted_measurement_stores_nothing(model, plans):
    command = [sys.executable, "-m", "moestream", "plan", str(model), "--measure", "--seconds", "100", "--ram", "300MB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "tok/s" in process.stderr.readline()  # the first candidate is through
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: nothing was stored" in errors
    assert time.monotonic() - began < 30
    assert not plans.exists()


@pytest.mark.parametrize("other", ["--forget", "--cache=page"])
def test_flags_that_exclude_each_other(run, model, other):
    result = run("plan", model, "--measure", other)
    assert result.returncode == 2
    assert "exclude each other" in result.stderr


def test_candidates_span_floor_and_budget():
    tried = candidates(PLAN, floor=30, staging=16, available=10**9)
    assert tried[:4] == [Candidate("arena", n) for n in (100, 75, 50, 30)]
    assert tried[4] == Candidate("page", 16)
    assert tried[5:] == [Candidate("hybrid", 50), Candidate("hybrid", 100)]
    scarce = candidates(PLAN, floor=80, staging=16, available=60_000)
    assert [c.slots for c in scarce if c.cache == "hybrid"] == [15, 30]  # half of what is free is the page cache's
    assert Candidate("arena", 80) not in scarce  # the floor is too near the budget to tell them apart
    assert all(c.slots >= 4 for c in candidates(dataclasses.replace(PLAN, slots=4), 30, 16, 10**9))


def test_of_equally_fast_candidates_the_larger_arena_is_chosen():
    small, large, hybrid = Candidate("arena", 50), Candidate("arena", 100), Candidate("hybrid", 50)
    assert choose({small: 10.0, large: 9.7, hybrid: 10.1}) == large
    assert choose({small: 10.0, large: 9.0, hybrid: 9.0}) == small  # the cliff
    assert choose({small: 8.0, large: 9.0, hybrid: 10.0}) == hybrid


@needs_native
def test_tuning_stays_within_its_budget_and_fills_what_it_times(model):
    budget = system.rss() + 120_000_000
    lines = []
    plan = tune(model, RunConfig(ram=budget, context=200), 2.0, "model", lines.append)
    assert plan.ram <= budget
    turns = [t for c in plan.measured["candidates"] for t in c["turns"]]
    assert len(lines) == len(turns)
    assert all(t["filled"] == 1 for t in turns)
    held = [c for c in plan.measured["candidates"] if c["cache"] == "arena"]
    assert held[0]["slots"] == max(c["slots"] for c in held)
    assert held[0]["turns"][0]["hit_rate"] == 1  # everything fits
    assert held[-1]["turns"][0]["hit_rate"] < 1


@needs_native
def test_random_weights_may_be_routed_as_published_models_are(model, monkeypatch):
    routed = []
    original = tuning.SyntheticRouter.ids
    monkeypatch.setattr(tuning.SyntheticRouter, "ids", lambda *a: routed.append(a[1]) or original(*a))
    tune(FOLDER / "qwen3_5-mlx4", RunConfig(ram=system.rss() + 120_000_000, context=64), 0.5, "calibrated", print)
    assert set(routed) == {0, 1, 2, 3}


def test_more_slots_are_expected_to_hit_more():
    rates = [expected_hit_rate(slots, 60, 512, 10) for slots in (300, 600, 60 * 64, 60 * 128, 60 * 512)]
    assert rates == sorted(rates)
    assert 0 < rates[0] < 0.5
    assert rates[2] == pytest.approx(0.71, abs=0.05)  # published: 0.67 with LRU
    assert rates[3] == pytest.approx(0.81, abs=0.05)
    assert rates[4] == 1
