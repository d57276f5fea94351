"""``moestream inspect``: what a checkpoint is and what running it would take. Reads headers only."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestream.cli import options
from moestream.config import CacheMode, RunConfig, format_size

if TYPE_CHECKING:
    from moestream.models.config import ModelConfig
    from moestream.models.weights import WeightMap


def inspect(
    model: Annotated[str, typer.Argument(help="A model folder, or 'demo'.", metavar="MODEL")],
    ram: options.Ram = None,
    cache: options.Cache = None,
    active_experts: options.ActiveExperts = None,
    exact: options.Exact = False,
    context: options.Context = None,
    as_json: options.Json = False,
) -> None:
    """Show a model's architecture, sizes, bytes per token and the memory it would use."""
    facts = describe(model, ram, cache, active_experts, exact, context)
    print(json.dumps(facts, indent=2) if as_json else "\n".join(lines(facts)))


def describe(
    model: str, ram: int | None, cache: CacheMode | None, active_experts: int | None, exact: bool, context: int | None
) -> dict[str, Any]:
    """Everything known from the headers, as plain values."""
    from moestream.bench.demand import token_demand  # noqa: PLC0415
    from moestream.checkpoint.index import open_checkpoint  # noqa: PLC0415
    from moestream.engine.load import choose_ops  # noqa: PLC0415
    from moestream.errors import BudgetError  # noqa: PLC0415
    from moestream.llm import find_model  # noqa: PLC0415
    from moestream.models.registry import parse_config  # noqa: PLC0415
    from moestream.models.weights import map_weights  # noqa: PLC0415
    from moestream.plan import plan_memory  # noqa: PLC0415

    run = RunConfig(ram=ram, cache=cache, active_experts=active_experts, exact=exact, context=context, max_batch=1)
    checkpoint = open_checkpoint(find_model(model))
    config, names = parse_config(checkpoint.config)
    weights = map_weights(checkpoint, config, names)
    demand = token_demand(config, weights, active_experts or config.moe.active)
    memory: dict[str, Any]
    try:
        plan = plan_memory(weights, config, run, choose_ops(run, 1))
        memory = {**dataclasses.asdict(plan), "arena": plan.arena, "total": plan.total}
    except BudgetError as error:
        memory = {"error": str(error)}
    return {
        "path": str(checkpoint.path),
        "model_type": config.model_type,
        "layers": dict(Counter(f"{layer.mixer} + {layer.mlp}" for layer in config.layers)),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "experts": config.moe.experts,
        "experts_per_token": config.moe.active,
        "expert_width": config.moe.intermediate,
        "shared_expert_width": config.moe.shared_intermediate,
        "expert_bytes": max((table.layout.nbytes for table in weights.experts.values()), default=0),
        **_sizes(config, weights),
        "bytes_per_token": demand.touched,
        "expert_bytes_per_token": demand.expert_bytes,
        "files": len(checkpoint.files),
        "memory": memory,
    }


def _sizes(config: ModelConfig, weights: WeightMap) -> dict[str, Any]:
    """Bytes and parameters inside and outside of the routed experts, and the encodings of both."""
    dense = list(weights.matrices())
    experts = [m for table in weights.experts.values() for m in table.layout.matrices]
    return {
        "dense_bytes": weights.dense_nbytes,
        "dense_parameters": sum(spec.layout.rows * spec.layout.cols for spec in dense),
        "dense_encodings": dict(Counter(spec.layout.encoding.name for spec in dense)),
        "experts_bytes": config.moe.experts * sum(m.nbytes for m in experts),
        "experts_parameters": config.moe.experts * sum(m.rows * m.cols for m in experts),
        "expert_encodings": dict(Counter(m.encoding.name for m in experts)),
    }


def lines(f: dict[str, Any]) -> list[str]:
    """The facts for people."""
    shared = f", shared expert of width {f['shared_expert_width']}" if f["shared_expert_width"] else ""
    rows = [
        (
            "model",
            f"{f['path']} ({f['model_type']}, {_count(f['dense_parameters'] + f['experts_parameters'])} parameters)",
        ),
        ("layers", ", ".join(f"{n} x {kind}" for kind, n in f["layers"].items()) + f"; hidden size {f['hidden_size']}"),
        ("experts", f"{f['experts']} a layer of width {f['expert_width']}, {f['experts_per_token']} per token{shared}"),
        ("encoding", f"experts {', '.join(f['expert_encodings'])}; dense {', '.join(f['dense_encodings'])}"),
        ("dense", f"{format_size(f['dense_bytes'])} ({_count(f['dense_parameters'])} parameters)"),
        (
            "streamed",
            f"{format_size(f['experts_bytes'])} in {f['files']} files, {format_size(f['expert_bytes'])} an expert",
        ),
        (
            "a token",
            f"touches {format_size(f['bytes_per_token'])}, of it {format_size(f['expert_bytes_per_token'])} of experts",
        ),
        ("context", f"{f['max_positions']} tokens, vocabulary of {f['vocab_size']}"),
    ]
    m = f["memory"]
    if "error" in m:
        rows.append(("memory", m["error"]))
    else:
        held = f"{m['slots']} of {m['experts']} experts" if m["experts"] else "no experts"
        rows += [
            ("memory", f"{format_size(m['total'])} of a budget of {format_size(m['budget'])}"),
            ("", f"{format_size(m['dense'])} dense, {format_size(m['states'])} states for {m['context']} tokens,"),
            ("", f"{format_size(m['scratch'])} working memory,"),
            ("", f"{format_size(m['baseline'])} process,"),
            ("", f"{format_size(m['arena'])} slots: room for {held}"),
            (
                "a prompt",
                f"in sweeps of {m['prefill_chunk']} tokens"
                + (f", which borrow {format_size(m['borrowed'])} of the slots' memory" if m["borrowed"] else ""),
            ),
        ]
    return [f"{name:10}{text}" for name, text in rows]


def _count(parameters: int) -> str:
    """``30.5 B`` parameters."""
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
