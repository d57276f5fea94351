"""From records of single runs to medians, percent of the ceilings and ratios: a table for people, a dict for JSON."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

GB, MB = 1e9, 1e6
OURS = "moestream"
Record = dict[str, Any]


def judge(record: Record, demand: dict[str, float], distinct: float, head: float) -> None:
    """Add to a record what disk, memory and arithmetic alone would have needed for a token, and which binds.

    Args:
        record: of one run; ``ceilings`` are those probed before and after it.
        demand: ``dense_bytes`` and ``expert_bytes`` of a token, ``flops``, ``head_flops``.
        distinct: for a prompt: how many times the experts of one token its chunk needs; for decoding 1.
        head: tokens that share one use of the dense matrices and one of the head: those of a prompt, or 1.
    """
    if "error" in record:
        return
    limits, prompt = record["ceilings"], head > 1
    touched = demand["dense_bytes"] / head + demand["expert_bytes"] * distinct / head
    flops = demand["flops"] - (demand["head_flops"] * (1 - 1 / head) if prompt else 0)
    floors = {
        "disk": record["bytes_per_token"] / limits["disk"],
        "memory": touched / limits["memory"],
        "arithmetic": flops / limits["int8"],
    }
    limit = max(floors, key=lambda name: floors[name])
    record |= {"floors": floors, "limit": limit, "percent": 100 * floors[limit] / record["seconds_per_token"]}


def condition(record: Record) -> str:
    """What is compared with what: case, phase, routing and memory. The read-ahead is a matter of the peers' tuning."""
    held = f", {record['withheld'] / GB:.0f} GB withheld" if record["withheld"] else ""
    return f"{record['case']} {record['phase']}, {record['routing']} routing{held}"


def setting(record: Record) -> str:
    """How a program was run."""
    ahead = record["read_ahead"]
    return f"{record['engine']} {record['variant']}" + (f", read-ahead {ahead} KB" if record["tuned"] else "")


def summarise(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Rows of each condition: ours first, then the peers' settings from fast to slow, failures last.

    Each row has the median over all counted windows of all rounds, its range, medians of the rest, and in ``ours_is``
    how many times faster ours was: the median over rounds in which both ran, else the ratio of the medians.
    """
    grouped: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        grouped[condition(record)][setting(record)].append(record)
    return {where: _rows(settings) for where, settings in grouped.items()}


def _rows(settings: dict[str, list[Record]]) -> list[Record]:
    rows = [_row(name, runs) for name, runs in settings.items()]
    ours = next((row for row in rows if row["engine"] == OURS and row["tok_s"]), None)
    for row in rows:
        if ours and row["tok_s"] and row is not ours:
            shared = [ours["rounds"][r] / rate for r, rate in row["rounds"].items() if r in ours["rounds"]]
            row["ours_is"] = statistics.median(shared) if shared else ours["tok_s"] / row["tok_s"]
    return sorted(rows, key=lambda row: (row["engine"] != OURS, -(row["tok_s"] or 0)))


def _row(name: str, runs: Sequence[Record]) -> Record:
    """One setting, over all its runs."""
    row: Record = {"name": name, "engine": runs[0]["engine"], "tok_s": None, "errors": []}
    row["errors"] = [run["error"] for run in runs if "error" in run]
    good = [run for run in runs if "error" not in run]
    row["disturbed"] = bool(good) and all(run["disturbed"] for run in good)
    good = [run for run in good if not run["disturbed"]] or good
    if good:
        rates = [rate for run in good for rate in run["rates"]]
        row |= {"tok_s": statistics.median(rates), "low": min(rates), "high": max(rates), "runs": len(good)}
        row["rounds"] = {run["round"]: statistics.median(run["rates"]) for run in good}
        for key in ("bytes_per_token", "in_flight", "cores", "percent"):
            row[key] = statistics.median(run[key] for run in good)
        row["limit"] = statistics.mode(run["limit"] for run in good)
        for key in ("disk", "memory", "int8"):
            row[f"{key}_ceiling"] = statistics.median(run["ceilings"][key] for run in good)
    return row


def best(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """The fastest setting of each program in each condition; failures and slower ones need no second round."""
    found: dict[tuple[str, str], str] = {}
    for where, rows in summarise(records).items():
        for row in rows:
            if row["tok_s"]:
                found.setdefault((where, row["engine"]), row["name"])
    return found


def table(summary: dict[str, list[Record]]) -> list[str]:
    """Lines in Markdown."""
    lines = []
    for where, rows in summary.items():
        lines += ["", f"**{where}**", ""]
        lines.append(
            "| program | tok/s (lowest, highest) | ours is | MB read a token | reads in flight | cores | of ceiling |"
        )
        lines.append("|---|---|---|---|---|---|---|")
        for row in rows:
            failed = "; ".join(sorted(set(row["errors"])))
            if not row["tok_s"]:
                lines.append(f"| {row['name']} | {failed} | | | | | |")
                continue
            note = "; also " * bool(failed) + failed + "; other programs disturbed it" * row["disturbed"]
            ratio = f"{row['ours_is']:.2f}x" if "ours_is" in row else ""
            lines.append(
                f"| {row['name']} | {row['tok_s']:.2f} ({row['low']:.2f}, {row['high']:.2f}) | {ratio} "
                f"| {row['bytes_per_token'] / MB:.1f} | {row['in_flight']:.1f} | {row['cores']:.2f} "
                f"| {row['percent']:.0f} % of {row['limit']} "
                f"({row['memory_ceiling'] / GB:.0f} GB/s memory, {row['disk_ceiling'] / GB:.1f} disk, "
                f"{row['int8_ceiling'] / 1e12:.2f} Tops){note} |"
            )
    return lines
