"""What a memory plan promises before anything is loaded: expected hit rate, bytes a token, ceilings.

Shape letters: E experts of a layer, k experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moestream.bench.ceilings import ComputeRates, DiskRates
from moestream.bench.demand import Demand
from moestream.bench.report import GB, floor_seconds
from moestream.checkpoint.routing import SyntheticRouter
from moestream.config import format_size
from moestream.experts.policy import LFRU, Request, simulate
from moestream.plan import MemoryPlan

SIMULATED_LAYERS, SIMULATED_TOKENS = 3, 256


def expected_hit_rate(slots: int, layers: int, experts: int, active: int) -> float:
    """Hit rate of LFRU on routing calibrated to published models: an estimate, `moestream plan --measure` measures.

    Args:
        slots: of all layers together.
        layers: that have experts.
        experts: E.
        active: k.
    """
    if slots >= layers * experts:
        return 1.0
    few = min(layers, SIMULATED_LAYERS)
    capacity = max(1, round(slots * few / layers))
    router = SyntheticRouter(experts, active, few)
    policy = LFRU(capacity, [layer for layer in range(few) for _ in range(experts)])
    rate = 0.0
    for _ in range(2):  # the first half warms up
        trace = []
        for token in zip(*(router.ids(layer, SIMULATED_TOKENS) for layer in range(few)), strict=True):
            trace += [
                Request(layer, (np.sort(ids) + layer * experts).tolist(), [1] * active, 1)
                for layer, ids in enumerate(token)
            ]
        rate = simulate(policy, trace).hit_rate
    return rate


def outlook(
    plan: MemoryPlan,
    demand: Demand,
    hit_rate: float,
    chunk: int,
    experts_nbytes: int,
    rates: tuple[DiskRates, ComputeRates] | None,
    exact: bool,
) -> dict[str, Any]:
    """Bytes and ceilings of decode and prefill as plain values.

    Args:
        plan: the memory plan.
        demand: of one decoded token.
        hit_rate: expected share of experts in slots.
        chunk: prompt tokens of a sweep.
        experts_nbytes: routed experts of all layers.
        rates: of disk, memory and arithmetic; None: no ceilings.
        exact: float32 activations.
    """
    missed = (1 - hit_rate) * demand.expert_bytes
    held = min(1.0, max(0.0, 1 - plan.streamed / (plan.experts * plan.slot_nbytes))) if plan.experts else 1.0
    swept = min(1.0, chunk * demand.expert_bytes / experts_nbytes) * (1 - held) * experts_nbytes if plan.experts else 0
    facts: dict[str, Any] = {
        "expected_hit_rate": hit_rate,
        "touched_per_token": demand.touched,
        "missed_per_token": missed,
        "prefill_chunk": chunk,
        "read_per_chunk": swept,
    }
    if rates is not None:
        disk, compute = rates
        flops = chunk * (demand.flops - demand.head_flops) + demand.head_flops
        touched = demand.dense_bytes + experts_nbytes
        decode = floor_seconds(missed, demand.touched, demand.flops, disk.large, compute, exact)
        prefill = floor_seconds(swept, touched, flops, disk.large, compute, exact)
        facts |= {
            "decode_ceiling_tok_s": 1 / max(decode.values()),
            "decode_limit": max(decode, key=lambda name: decode[name]),
            "prefill_ceiling_tok_s": chunk / max(prefill.values()),
            "prefill_limit": max(prefill, key=lambda name: prefill[name]),
        }
    return facts


def outlook_lines(f: dict[str, Any], plan: MemoryPlan, floor: int, largest: int) -> list[str]:
    """The outlook for people; ``floor`` and ``largest`` are numbers of slots."""
    rows = []
    if plan.experts:
        floor_bytes, largest_bytes = (format_size(n * plan.slot_nbytes) for n in (floor, largest))
        under = "below it" if plan.slots < floor else "above it"
        rows += [
            ("hit rate", f"about {100 * f['expected_hit_rate']:.0f} % expected, if it routes as published models do"),
            ("floor", f"{floor} slots ({floor_bytes}) are what one token touches: this plan is {under}"),
            (
                "cliff",
                f"{largest} slots ({largest_bytes}) are the most that leaves the system its share of memory; "
                "--measure finds out whether fewer are faster",
            ),
        ]
    rows += [
        (
            "a token",
            f"touches {format_size(f['touched_per_token'])}, reads about {format_size(f['missed_per_token'])} "
            "from the disk",
        ),
        (
            "a prompt",
            f"in sweeps of {f['prefill_chunk']} tokens; one reads at most about {format_size(f['read_per_chunk'])}"
            + (f" and borrows {format_size(plan.borrowed)} of the slots' memory" if plan.borrowed else ""),
        ),
    ]
    if "decode_limit" in f:
        rows.append(
            (
                "ceilings",
                f"decode {f['decode_ceiling_tok_s']:.1f} tok/s ({f['decode_limit']}), prefill "
                f"{f['prefill_ceiling_tok_s']:.0f} tok/s ({f['prefill_limit']}): nothing can be faster here",
            )
        )
    return [f"{name:10}{text}" for name, text in rows]


def rates_lines(disk: DiskRates, compute: ComputeRates) -> list[str]:
    """What the ceilings are made of."""
    return [
        f"machine   disk {disk.large / GB:.2f} GB/s at 8 MB, memory {compute.memory / GB:.1f} GB/s, "
        f"int8 {compute.int8 / 1e12:.2f} Tops/s (probed for two seconds)"
    ]
