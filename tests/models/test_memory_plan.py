"""Budgets: what fits is divided, what does not says what is needed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from golden_models import Golden, golden

from moestream.config import RunConfig
from moestream.errors import BudgetError, ConfigError
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights
from moestream.ops.reference import ReferenceOps
from moestream.plan import MemoryPlan, plan_memory


def planned(tiny: Golden, run: RunConfig, budget: int | None = None, most_slots: int | None = None) -> MemoryPlan:
    config, names = parse_config(tiny.checkpoint.config)
    return plan_memory(map_weights(tiny.checkpoint, config, names), config, run, ReferenceOps(), budget, most_slots)


def test_slots_fill_the_budget(tiny: Golden) -> None:
    everything = planned(tiny, RunConfig(context=64))
    assert everything.slots == everything.experts
    assert everything.total <= everything.budget
    slack = 8 << 20  # the process grows a little between two plans
    tight = planned(tiny, RunConfig(context=64), everything.fixed + 8 * everything.slot_nbytes + slack)
    assert tight.slots_minimum <= tight.slots
    assert tight.total <= tight.budget


def test_too_small_budgets_name_the_flags() -> None:
    tiny = golden("qwen3_5-mlx4")
    with pytest.raises(BudgetError) as caught:
        planned(tiny, RunConfig(ram=1_000_000, max_batch=8))
    for word in ("1.0 MB", "--ram", "--context or --max-batch", "--prefill-chunk", "states of 4096 tokens"):
        assert word in str(caught.value)


@pytest.mark.parametrize(("room", "batch"), [(0.5, 1), (1.5, 1), (3.5, 3), (8.5, 8), (100, 8)])
def test_states_leave_the_experts_seven_eighths(room: float, batch: int) -> None:
    """``room``: an eighth of what is left for states and experts, in sequences of full length; short ones are more."""
    tiny = golden("qwen3_5-mlx4")
    one = planned(tiny, RunConfig(max_batch=1))
    budget = one.fixed - one.states + int(8 * room * one.states)
    chosen = planned(tiny, RunConfig(), budget)
    assert chosen.states == batch * one.states
    assert batch <= chosen.max_batch <= min(8, 4 * batch)
    assert planned(tiny, RunConfig(max_batch=20), budget + 8 * one.states).max_batch == 20  # as asked for


def test_modes_without_a_cache_take_only_staging_slots() -> None:
    tiny = golden("qwen3_5-mlx4")
    run = RunConfig(max_batch=1, io_threads=1)
    for mode in ("page", "none"):
        assert planned(tiny, dataclasses.replace(run, cache=mode)).slots == 3


def test_an_automatic_chunk_is_long_where_experts_are_streamed() -> None:
    tiny = golden("qwen3_5-mlx4")
    run = RunConfig(max_batch=1, context=64)
    base, long = (planned(tiny, dataclasses.replace(run, prefill_chunk=chunk)) for chunk in (512, 2048))
    slack = 8 << 20  # the process grows a little between two plans

    def chosen(room: float, most_slots: int | None = None, **other: Any) -> int:
        """With room for experts of so many times what a chunk of 2,048 takes more than one of 512."""
        budget = base.fixed + int(room * (long.scratch - base.scratch)) + slack
        return planned(tiny, dataclasses.replace(run, **other), budget, most_slots).prefill_chunk

    assert [chosen(room, cache="none") for room in (0.5, 3, 5, 10)] == [512, 1024, 2048, 4096]
    assert chosen(5, cache="page") == 2048
    assert (chosen(3, base.experts - 1), chosen(5, base.experts - 1)) == (1024, 2048)
    assert chosen(5) == 512  # every expert stays in memory
    assert chosen(5, cache="none", prefill_chunk=300) == 300  # what is asked for wins


def test_sweeps_borrow_from_the_slots_where_experts_are_streamed() -> None:
    tiny = golden("qwen3_5-mlx4")
    run = RunConfig(max_batch=2, context=64, prefill_chunk=2048)
    whole = planned(tiny, run)
    assert whole.borrowed == 0
    assert whole.borrowed_slots(2048) == 0
    assert planned(tiny, dataclasses.replace(run, cache="none")).borrowed == 0
    slack = 8 << 20
    least = whole.scratch // 8
    for room in (0.5, 2.0, 6.0):  # times what a sweep needs
        budget = whole.fixed - whole.scratch + least + int(room * whole.scratch) + slack
        plan = planned(tiny, run, budget, whole.experts - 1)
        assert plan.borrowed <= plan.arena
        assert plan.scratch + plan.borrowed == whole.scratch
        assert plan.total <= plan.budget
        for rows in (1, 2, 34, 35, 100, 1000, 2048, 2050):
            chunk = max(1, rows - plan.max_batch)
            needed = planned(tiny, dataclasses.replace(run, prefill_chunk=chunk, cache="none"), whole.budget).scratch
            assert plan.scratch + plan.borrowed_slots(rows) * plan.slot_nbytes >= needed
        assert plan.borrowed_slots(2) == 0
        assert (plan.borrowed_slots(10**6) - 1) * plan.slot_nbytes < plan.borrowed


def test_a_small_budget_gets_a_short_chunk() -> None:
    tiny = golden("qwen3_5-mlx4")
    run = RunConfig(max_batch=1, context=64)
    base, short = planned(tiny, run), planned(tiny, dataclasses.replace(run, prefill_chunk=128))
    budget = (base.fixed + short.fixed) // 2 + base.slots_minimum * base.slot_nbytes
    assert planned(tiny, run, budget).prefill_chunk in (128, 256)
    with pytest.raises(BudgetError):
        planned(tiny, dataclasses.replace(run, prefill_chunk=512), budget)


def test_context_is_bounded_by_the_model() -> None:
    with pytest.raises(ConfigError, match="context is 5000, the model was trained for 4096"):
        planned(golden("qwen3_5-mlx4"), RunConfig(context=5000))


def test_a_token_touches_k_experts_of_each_layer(tiny: Golden) -> None:
    config, names = parse_config(tiny.checkpoint.config)
    one = sum(table.layout.nbytes for table in map_weights(tiny.checkpoint, config, names).experts.values())
    assert planned(tiny, RunConfig()).token_nbytes == config.moe.active * one
    assert planned(tiny, RunConfig(active_experts=1)).token_nbytes == one


BUSY = """
import sys
from typing import Any
from pathlib import Path
from moestream.config import RunConfig
from moestream.engine.load import load_runtime
from moestream.engine.sampling import SamplingParams
from moestream.system import peak_rss, rss

settings = {"context": 3000, "max_batch": 6, "prefill_chunk": 256, "backend": sys.argv[2]}
runtime = load_runtime(Path(sys.argv[1]), RunConfig(ram=rss() + 160_000_000, **settings))
params = SamplingParams(max_tokens=4, ignore_eos=True)
requests = [runtime.engine.add([7] * n, params) for n in (2500, 900, 900, 300, 3)]
while not runtime.engine.idle:
    runtime.engine.step()
assert all(len(request.tokens) == 4 for request in requests)
print(peak_rss(), runtime.plan.total)
runtime.close()
"""


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.filterwarnings("ignore:slow fallback")
def test_a_busy_process_stays_within_its_plan(backend: str) -> None:
    folder = golden("qwen3_5-mlx4").folder
    result = subprocess.run(
        [sys.executable, "-c", BUSY, str(folder), backend], capture_output=True, text=True, check=True, timeout=120
    )
    peak, planned_total = map(int, result.stdout.split())
    assert peak <= planned_total
