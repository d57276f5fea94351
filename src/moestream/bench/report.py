"""From measurements to percent of the ceiling that binds: one dict for JSON, lines for people."""

from __future__ import annotations

from typing import Any

from moestream.bench.ceilings import ComputeRates, DiskRates
from moestream.bench.demand import Demand
from moestream.bench.measure import Phase
from moestream.config import format_size

GB = 1e9


def floor_seconds(
    missed: float, touched: float, flops: float, disk: float, compute: ComputeRates, exact: bool
) -> dict[str, float]:
    """What each resource alone needs for some work, in seconds; the largest is the limit."""
    return {
        "disk": missed / disk,
        "memory": touched / compute.memory,
        "arithmetic": flops / (compute.fma if exact else compute.int8),
    }


def ceilings(disk: DiskRates, compute: ComputeRates) -> dict[str, Any]:
    """The ceilings as plain values in bytes and operations per second."""
    return {
        "disk_direct": disk.direct,
        "disk_1mb": disk.small,
        "disk_8mb": disk.large,
        "memory": compute.memory,
        "int8": compute.int8,
        "fma": compute.fma,
        "threads": compute.threads,
    }


def machine_lines(facts: dict[str, Any]) -> list[str]:
    """Machine and versions for people."""
    m, v = facts["machine"], facts["versions"]
    return [
        f"machine    {m['cpu']}, {m['isa']} kernels, {format_size(m['memory'])} memory",
        f"versions   moestream {v['moestream']}, Python {v['python']}, numpy {v['numpy']}, {v['os']}",
        f"checkpoint {facts['checkpoint']}",
    ]


def ceiling_lines(c: dict[str, Any]) -> list[str]:
    """The ceilings for people."""
    kind = "direct" if c["disk_direct"] else "buffered: this file system refuses direct reads"
    return [
        f"disk       {c['disk_1mb'] / GB:.2f} GB/s at 1 MB, {c['disk_8mb'] / GB:.2f} at 8 MB ({kind})",
        f"memory     {c['memory'] / GB:.1f} GB/s with {c['threads']} threads",
        f"arithmetic {c['int8'] / 1e12:.2f} Tops/s int8, {c['fma'] / 1e12:.2f} Tflop/s float32",
    ]


def _missed(phase: Phase) -> int:
    """Bytes that had to be read: a wrong guess is no work done."""
    return phase.io.bytes_read - phase.io.bytes_wasted


def phase_facts(phase: Phase, floors: dict[str, float]) -> dict[str, Any]:
    """One phase as plain values, with the ceiling that binds."""
    limit = max(floors, key=lambda name: floors[name])
    return {
        "tokens": phase.tokens,
        "seconds": phase.seconds,
        "tok_s": phase.rate,
        "bytes_read": phase.io.bytes_read,
        "bytes_page_cache": phase.io.bytes_cached,
        "hit_rate": phase.io.hit_rate,
        "overlap": phase.io.overlap,
        "stall_seconds": phase.io.stall_seconds,
        "hits_ahead": phase.io.hits_ahead,
        "bytes_ahead": phase.io.bytes_ahead,
        "bytes_wasted": phase.io.bytes_wasted,
        "floor_seconds": floors,
        "limit": limit,
        "percent_of_limit": 100.0 * floors[limit] / phase.seconds,
    }


def decode_facts(phase: Phase, demand: Demand, disk: float, compute: ComputeRates, exact: bool) -> dict[str, Any]:
    """Decoding, after the warm-up."""
    n = phase.tokens
    floors = floor_seconds(_missed(phase), n * demand.touched, n * demand.flops, disk, compute, exact)
    return {
        **phase_facts(phase, floors),
        "median_tok_s": phase.median_rate,
        "bytes_read_per_token": phase.io.bytes_read / n,
        "bytes_touched_per_token": demand.touched,
    }


def prefill_facts(
    phase: Phase, demand: Demand, expert_bytes: int, chunk: int, disk: float, compute: ComputeRates, exact: bool
) -> dict[str, Any]:
    """A sweep: what a chunk touches is the dense part and each distinct expert once."""
    chunks = -(-phase.tokens // chunk)
    touched = chunks * demand.dense_bytes + phase.distinct * expert_bytes
    flops = phase.tokens * (demand.flops - demand.head_flops) + demand.head_flops
    floors = floor_seconds(_missed(phase), touched, flops, disk, compute, exact)
    return {
        **phase_facts(phase, floors),
        "chunks": chunks,
        "experts_asked": phase.distinct,
        "experts_read": phase.expert_reads,
        "most_reads_of_an_expert_in_a_chunk": phase.most_reads,
        "each_expert_read_at_most_once": phase.most_reads <= 1,
    }


def phase_lines(name: str, f: dict[str, Any]) -> list[str]:
    """One phase for people."""
    rate = f"{f['tok_s']:.2f} tok/s"
    if "median_tok_s" in f:
        rate = f"{f['median_tok_s']:.2f} tok/s (median; mean {f['tok_s']:.2f})"
    per_token = f["bytes_read"] / f["tokens"]
    lines = [
        f"{name:10} {f['tokens']} tokens at {rate}: {f['percent_of_limit']:.0f} % of the {f['limit']} ceiling",
        f"           read {format_size(per_token)} a token; hit rate {100 * f['hit_rate']:.1f} %, "
        f"{100 * f['overlap']:.0f} % of I/O hidden, waited {f['stall_seconds']:.2f} of {f['seconds']:.2f} s",
    ]
    if f["bytes_ahead"] or f["bytes_wasted"]:
        lines.append(
            f"           {format_size(f['bytes_ahead'] / f['tokens'])} a token read ahead of the router and used, "
            f"{format_size(f['bytes_wasted'] / f['tokens'])} for nothing (not counted for the ceiling)"
        )
    if "experts_asked" in f:
        lines.append(
            f"           {f['experts_asked']} experts needed, {f['experts_read']} read, "
            f"none more than {f['most_reads_of_an_expert_in_a_chunk']} times in a chunk"
        )
    return lines
