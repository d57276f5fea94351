"""The whole benchmark of one checkpoint: ceilings, prefill, warm-up, decode, ceilings again."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moestream import system
from moestream.bench import report
from moestream.bench.ceilings import (
    ComputeRates,
    DiskRates,
    active_isa,
    compute_rates,
    disk_rates,
    mean_rates,
    probe_file,
)
from moestream.bench.checkpoints import repeated
from moestream.bench.demand import token_demand
from moestream.bench.measure import Meter, Phase
from moestream.checkpoint.index import open_checkpoint
from moestream.checkpoint.routing import RECALL, SyntheticRouter
from moestream.config import RunConfig
from moestream.engine.load import Progress, Runtime, load_runtime
from moestream.errors import ConfigError
from moestream.models.registry import parse_config
from moestream.models.weights import WeightMap, map_weights

DISK_SECONDS = 0.7
DRIFT = 0.2
"""The disk probes before and after may differ by this share."""


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What to measure.

    Raises:
        ConfigError: a count is below 2; the message names it.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    warmup: int = 256
    """Tokens decoded at most before decoding is timed."""
    repeat_layers: int = 1
    """Run the layers so many times over, see ``checkpoints.repeated``."""
    routing: Literal["model", "calibrated", "uniform"] = "model"
    """``model``: the router's own choice; the others impose one, for random weights."""

    def __post_init__(self) -> None:
        """Reject what could only fail later."""
        for name in ("prompt_tokens", "new_tokens"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} must be at least 2, got {getattr(self, name)}")


def run_bench(
    folder: Path,
    run: RunConfig,
    settings: BenchSettings,
    say: Callable[[str], None],
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure one checkpoint.

    Args:
        folder: The checkpoint.
        run: How to run it; one sequence whatever ``max_batch`` says.
        settings: What to measure.
        say: Called with each line for people.
        progress: Called with what goes on; while the model is loaded as for ``load_runtime``, else with (what, 0, 0).

    Returns:
        Everything measured, ready for JSON.

    Raises:
        BackendError: the native module is not installed.
        MoestreamError: the checkpoint cannot be run.
    """
    checkpoint = repeated(open_checkpoint(folder), settings.repeat_layers)
    config, names = parse_config(checkpoint.config)
    weights = map_weights(checkpoint, config, names)
    machine = {"cpu": system.cpu_name(), "isa": active_isa(), "memory": system.memory().total}
    progress("Measuring memory and arithmetic", 0, 0)
    compute = compute_rates(run.threads or system.cpu_count())
    progress("Measuring the disk", 0, 0)
    with probe_file(checkpoint.files) as probed:
        before = disk_rates(probed, DISK_SECONDS)
        facts: dict[str, Any] = {
            "machine": machine,
            "versions": {name: version(name) for name in ("moestream", "numpy")}
            | {"python": platform.python_version(), "os": platform.platform()},
            "checkpoint": str(folder),
            "ceilings": report.ceilings(before, compute),
        }
        for line in [*report.machine_lines(facts), *report.ceiling_lines(facts["ceilings"])]:
            say(line)
        loading = f"Loading {folder.name}"
        progress(loading, 0, 0)
        runtime = load_runtime(
            folder,
            run,
            progress=lambda _what, done, total: progress(loading, done, total),
            checkpoint=checkpoint,
        )
        try:
            facts |= {"settings": asdict(settings), "run": asdict(run), "plan": asdict(runtime.plan)}
            if settings.repeat_layers > 1:
                say(f"layers     {len(config.layers)}: those of the checkpoint {settings.repeat_layers} times over")
            if settings.routing != "model":
                facts["predictor_recall"] = RECALL
                say(f"routing    imposed: {settings.routing}; a simulated predictor foresees {RECALL:.0%} of it")
                _impose(runtime, settings)
            facts |= _measure(runtime, weights, settings, run, before, compute, probed, say, progress)
        finally:
            runtime.close()
    facts["peak_rss"] = system.peak_rss()
    return facts


def _impose(runtime: Runtime, settings: BenchSettings) -> None:
    """Replace the router's choice and what is foreseen of it; the cost of computing both stays."""
    moe, layers = runtime.config.moe, len(runtime.config.layers)
    uniform = settings.routing == "uniform"
    router = SyntheticRouter(moe.experts, runtime.model.active_experts, layers, uniform=uniform)
    runtime.model.router_override, runtime.model.predict_override = router.ids, router.predict


def _measure(
    runtime: Runtime,
    weights: WeightMap,
    settings: BenchSettings,
    run: RunConfig,
    before: DiskRates,
    compute: ComputeRates,
    probed: Path,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Prefill, warm-up and decode, judged by the mean of the ceilings before and after."""
    demand = token_demand(runtime.config, weights, runtime.model.active_experts)
    expert = max((table.layout.nbytes for table in weights.experts.values()), default=0)
    meter = Meter(runtime)
    prompt = np.random.default_rng(0).integers(0, runtime.config.vocab_size, settings.prompt_tokens).tolist()
    progress("Reading the prompt", 0, 0)
    meter.start(prompt, settings.warmup + settings.new_tokens + 1)
    prefill = meter.prefill(settings.prompt_tokens)
    progress("Decoding until the hit rate settles", 0, 0)
    warmup = meter.warm_up(settings.warmup)
    progress("Decoding", 0, 0)
    decode = meter.decode(settings.new_tokens)
    warm = None
    if runtime.setup.cache == "arena" and runtime.plan.slots >= runtime.plan.experts:
        progress("Reading the prompt with every expert in memory", 0, 0)
        warm = meter.warm_prefill(prompt)
    progress("Measuring disk, memory and arithmetic again", 0, 0)
    after, compute_after = disk_rates(probed, DISK_SECONDS), compute_rates(compute.threads)
    disk = (before.large + after.large) / 2
    drift = abs(after.large - before.large) / disk
    compute = mean_rates(compute, compute_after)

    def prefill_facts(phase: Phase) -> dict[str, Any]:
        return report.prefill_facts(phase, demand, expert, runtime.plan.prefill_chunk, disk, compute, run.exact)

    facts: dict[str, Any] = {
        "demand": asdict(demand),
        "ceilings_after": report.ceilings(after, compute_after),
        "disk_drift": drift,
        "prefill": prefill_facts(prefill),
        "prefill_warm": None if warm is None else prefill_facts(warm),
        "warmup": warmup,
        "decode": report.decode_facts(decode, demand, disk, compute, run.exact),
    }
    for line in [
        *report.phase_lines("prefill", facts["prefill"]),
        *(report.phase_lines("  again", facts["prefill_warm"]) if warm else ()),
        f"warm-up    {warmup} tokens, not counted",
        *report.phase_lines("decode", facts["decode"]),
        f"afterwards {after.large / report.GB:.2f} GB/s disk at 8 MB, {compute_after.memory / report.GB:.1f} memory",
    ]:
        say(line)
    percents = [facts[phase]["percent_of_limit"] for phase in ("prefill", "prefill_warm", "decode") if facts[phase]]
    if drift > DRIFT or max(percents) > 100:
        say(f"repeat it  other work disturbed the probes (disk {100 * drift:.0f} % off, or a ceiling was exceeded)")
    return facts
