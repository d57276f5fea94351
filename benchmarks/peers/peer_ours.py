"""moestream's side of a comparison: loads a checkpoint, imposes the peers' routing, prints its windows as JSON.

Started by ``peer_runs.run_child``; takes its settings as JSON: ``folder``, ``ram`` and ``threads`` (null: what users
get), ``routing``, and ``phases``.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from peer_gguf import peer_router
from peer_router import Replay

import moestream
from moestream.bench.demand import token_demand
from moestream.bench.measure import Meter
from moestream.checkpoint.index import open_checkpoint
from moestream.config import RunConfig
from moestream.engine.load import load_runtime
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights

FILL = 512
"""Prompt tokens before decoding: a program that maps its file has read most of it when it starts, ours nothing."""


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure the phases one after another on one loaded model."""
    folder, phases = Path(settings["folder"]), settings["phases"]
    checkpoint = open_checkpoint(folder)
    config, names = parse_config(checkpoint.config)
    decoded = sum(p["tokens"] * (p["settle"] + p["windows"]) for p in phases if not p["prefill"])
    longest = max([p["tokens"] for p in phases if p["prefill"]] + [FILL])
    read = sum(p["tokens"] * (p["settle"] + p["windows"]) for p in phases if p["prefill"])
    runtime = load_runtime(
        folder,
        RunConfig(ram=settings["ram"], threads=settings["threads"], context=longest + decoded + 8, max_batch=1),
    )
    router = peer_router(checkpoint.config, settings["routing"])
    replay = Replay(router, len(runtime.config.layers), read + decoded + FILL + 8)
    runtime.model.router_override, runtime.model.predict_override = replay.ids, replay.predict
    meter = Meter(runtime)
    random = np.random.default_rng(0)
    windows: dict[str, list[tuple[float, float, int]]] = {}
    try:
        for phase in phases:
            found = windows[phase["name"]] = []
            if not phase["prefill"]:
                meter.start(random.integers(0, config.vocab_size, FILL).tolist(), decoded + 1)
                meter.prefill(FILL)
            for _ in range(phase["settle"] + phase["windows"]):
                if phase["prefill"]:
                    meter.start(random.integers(0, config.vocab_size, phase["tokens"]).tolist(), 1)
                start = time.monotonic()
                (meter.prefill if phase["prefill"] else meter.decode)(phase["tokens"])
                found.append((start, time.monotonic(), phase["tokens"]))
        demand = token_demand(config, map_weights(checkpoint, config, names), runtime.model.active_experts)
        plan = asdict(runtime.plan)
    finally:
        runtime.close()
    return {"phases": windows, "demand": asdict(demand), "plan": plan, "version": moestream.__version__}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1])), default=str))
