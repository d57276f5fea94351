"""``moestream bench``: what the machine gives, then what of it is reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from moestream.cli import options
from moestream.cli.output import Bar, byte_amount, note
from moestream.config import RunConfig
from moestream.errors import ConfigError


def bench(
    model: Annotated[str | None, typer.Argument(help="A model folder, or 'demo'.", metavar="[MODEL]")] = None,
    synthetic: Annotated[
        str | None, typer.Option(metavar="NAME", help="Random weights of a true shape, e.g. qwen3-30b-a3b.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the synthetic model. Default: all.")] = None,
    repeat_layers: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Run the layers N times over, each time with experts of their own to read: deeper "
            "models than the disk holds.",
        ),
    ] = 1,
    routing: Annotated[
        Literal["model", "calibrated", "uniform"] | None,
        typer.Option(
            help="model: as the router says. calibrated: hit rates as published for trained models. uniform: the worst "
            "case. Default: calibrated for synthetic models."
        ),
    ] = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    cache: options.Cache = None,
    prefetch: options.Prefetch = "auto",
    stored_plan: options.StoredPlan = True,
    active_experts: options.ActiveExperts = None,
    exact: options.Exact = False,
    prefill_chunk: options.PrefillChunk = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded and timed.")] = 64,
    warmup: Annotated[int, typer.Option(min=0, help="Tokens decoded at most until the hit rate settles.")] = 256,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where synthetic models are kept. Default: the cache folder.")
    ] = None,
    json_only: Annotated[bool, typer.Option("--json-only", help="Print only the last line, the JSON object.")] = False,
) -> None:
    """Measure prefill and decode against the ceilings of disk, memory and arithmetic."""
    if (model is None) == (synthetic is None):
        raise ConfigError("name one model: moestream bench MODEL, or moestream bench --synthetic qwen3-30b-a3b")
    if layers is not None and synthetic is None:
        raise ConfigError("--layers only applies to --synthetic")
    from moestream.bench.checkpoints import synthetic_folder  # noqa: PLC0415
    from moestream.bench.runner import BenchSettings, run_bench  # noqa: PLC0415
    from moestream.llm import find_model  # noqa: PLC0415

    settings = BenchSettings(
        prompt_tokens, new_tokens, warmup, repeat_layers, routing or ("calibrated" if synthetic else "model")
    )
    run = RunConfig(
        ram=ram,
        threads=threads,
        cache=cache,
        prefetch=prefetch,
        stored_plan=stored_plan,
        active_experts=active_experts,
        exact=exact,
        prefill_chunk=prefill_chunk,
        context=prompt_tokens + warmup + new_tokens + 2,
        max_batch=1,
    )
    if synthetic is None:
        path = find_model(str(model))
    else:
        with Bar(byte_amount) as bar:
            path, written = synthetic_folder(
                synthetic, layers, folder, lambda done, total: bar.update(f"Writing {synthetic}", done, total)
            )
        if written:
            note(f"wrote {path}; delete the folder when you are done")
    with Bar(byte_amount) as bar:

        def say(line: str) -> None:
            bar.hide()
            if not json_only:
                print(line, flush=True)

        facts = run_bench(path, run, settings, say, bar.update)
    print(json.dumps(facts))
