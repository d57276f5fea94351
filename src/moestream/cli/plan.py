"""``moestream plan``: how memory would be divided and what that promises; measured on request."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moestream.cli import options
from moestream.cli.output import INTERRUPTED, Bar, note, percent
from moestream.config import RunConfig, format_size
from moestream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from moestream.bench.ceilings import ComputeRates, DiskRates

PROBE_SECONDS = 0.5


def plan(
    model: Annotated[str, typer.Argument(help="A model folder, or 'demo'.", metavar="MODEL")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Try cache modes and sizes, and store the best for this machine.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=2, help="How long --measure may try, loading excluded.")] = 120,
    forget: Annotated[bool, typer.Option("--forget", help="Remove the stored plan of the model.")] = False,
    probe: Annotated[bool, typer.Option(help="Probe disk, memory and arithmetic for the ceilings.")] = True,
    routing: Annotated[
        Literal["model", "calibrated", "uniform"],
        typer.Option(help="What --measure routes by: the model, or as `bench` imposes on random weights."),
    ] = "model",
    ram: options.Ram = None,
    threads: options.Threads = None,
    cache: options.Cache = None,
    stored_plan: options.StoredPlan = True,
    active_experts: options.ActiveExperts = None,
    exact: options.Exact = False,
    context: options.Context = None,
    prefill_chunk: options.PrefillChunk = None,
    as_json: options.Json = False,
) -> None:
    """Show the memory plan of a model and its ceilings without loading it; --measure finds the best cache."""
    if measure and (cache is not None or forget):
        raise ConfigError(f"--measure and {'--forget' if forget else '--cache'} exclude each other")
    from moestream.llm import find_model  # noqa: PLC0415

    folder = find_model(model)
    run = RunConfig(
        ram=ram,
        threads=threads,
        cache=cache,
        stored_plan=stored_plan,
        active_experts=active_experts,
        exact=exact,
        context=context,
        prefill_chunk=prefill_chunk,
        max_batch=1,
    )
    if forget:
        from moestream.stored_plan import forget as remove  # noqa: PLC0415

        print("the stored plan is removed" if remove(folder) else "there is no stored plan of this model")
    elif measure:
        _measure(folder, run, seconds, routing, as_json)
    else:
        facts, lines = describe(folder, run, probe)
        print(json.dumps(facts, indent=2) if as_json else "\n".join(lines))


def _measure(
    folder: Path, run: RunConfig, seconds: float, routing: Literal["model", "calibrated", "uniform"], as_json: bool
) -> None:
    """Try, store the best, and say how to get rid of it."""
    from moestream.bench.tune import measured_lines, tune  # noqa: PLC0415
    from moestream.stored_plan import save  # noqa: PLC0415

    with Bar(percent) as bar:

        def say(line: str) -> None:
            bar.hide()
            note(line)

        try:
            best = tune(folder, run, seconds, routing, say, bar.update)
        except KeyboardInterrupt:
            bar.hide()
            note("interrupted: nothing was stored")
            raise typer.Exit(INTERRUPTED) from None
    path = save(folder, best)
    if as_json:
        print(json.dumps({"file": str(path), **dataclasses.asdict(best)}))
        return
    print("\n".join(measured_lines(best)))
    print(f"stored    {path}; run, chat, bench and LLM.load follow it where neither --ram nor --cache is given")


def describe(folder: Path, run: RunConfig, probe: bool) -> tuple[dict[str, Any], list[str]]:
    """The plan from the headers alone: plain values, and lines for people."""
    from moestream.bench.demand import token_demand  # noqa: PLC0415
    from moestream.bench.outlook import expected_hit_rate, outlook, outlook_lines, rates_lines  # noqa: PLC0415
    from moestream.bench.tune import measured_lines  # noqa: PLC0415
    from moestream.checkpoint.index import open_checkpoint  # noqa: PLC0415
    from moestream.engine.load import choose_ops  # noqa: PLC0415
    from moestream.models.registry import parse_config  # noqa: PLC0415
    from moestream.models.weights import map_weights  # noqa: PLC0415
    from moestream.plan import plan_memory  # noqa: PLC0415
    from moestream.stored_plan import follow  # noqa: PLC0415

    run, stored = follow(run, folder)
    checkpoint = open_checkpoint(folder)
    config, names = parse_config(checkpoint.config)
    weights = map_weights(checkpoint, config, names)
    ops = choose_ops(run, 1)
    memory = plan_memory(weights, config, run, ops, most_slots=stored.slots if stored else None)
    largest = plan_memory(weights, config, dataclasses.replace(run, cache="arena", ram=None), ops)
    active = run.active_experts or config.moe.active
    layers = len(weights.experts)
    demand = token_demand(config, weights, active)
    experts_nbytes = config.moe.experts * sum(table.layout.nbytes for table in weights.experts.values())
    keeps = run.cache in ("arena", "hybrid")
    hit = expected_hit_rate(memory.slots, layers, config.moe.experts, active) if keeps else 0.0
    rates = _rates(checkpoint.files, run) if probe else None
    facts = outlook(memory, demand, hit, memory.prefill_chunk, experts_nbytes, rates, run.exact)
    lines = [
        f"model     {folder} ({format_size(weights.dense_nbytes)} dense, {format_size(experts_nbytes)} of experts)",
        f"memory    {format_size(memory.total)} of a budget of {format_size(memory.budget)}; cache {run.cache}",
        f"          {format_size(memory.dense)} dense, {format_size(memory.states)} for {memory.context} tokens,",
        f"          {format_size(memory.scratch)} working memory, {format_size(memory.baseline)} process,",
        f"          {format_size(memory.arena)} slots: room for {memory.slots} of {memory.experts} experts",
        *outlook_lines(facts, memory, layers * active, largest.slots),
        *(rates_lines(*rates) if rates else []),
        *(measured_lines(stored) if stored else _unmeasured(run)),
    ]
    values = {
        "path": str(folder),
        "cache": run.cache,
        "memory": {**dataclasses.asdict(memory), "arena": memory.arena, "total": memory.total},
        "floor_slots": layers * active,
        "largest_slots": largest.slots,
        **facts,
        "rates": None if rates is None else [dataclasses.asdict(r) for r in rates],
        "stored": None if stored is None else dataclasses.asdict(stored),
    }
    return values, lines


def _rates(files: Sequence[Path], run: RunConfig) -> tuple[DiskRates, ComputeRates]:
    """Disk, memory and arithmetic, probed for about two seconds."""
    from moestream import system  # noqa: PLC0415
    from moestream.bench.ceilings import compute_rates, disk_rates, probe_file  # noqa: PLC0415

    with Bar() as bar, probe_file(files) as probed:
        bar.update("Measuring disk, memory and arithmetic")
        return disk_rates(probed, PROBE_SECONDS), compute_rates(run.threads or system.cpu_count())


def _unmeasured(run: RunConfig) -> list[str]:
    """Why no stored plan is shown."""
    if run.ram is not None or not run.stored_plan:
        return ["measured  the flags decide; a stored plan is followed where neither --ram nor --cache is given"]
    return ["measured  never; `moestream plan MODEL --measure` tries cache modes and sizes for two minutes"]
