"""``moestream doctor``: what this machine offers, what is in use, and how to get what is missing."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from moestream.cli import options
from moestream.cli.output import Bar
from moestream.config import format_size

PROBE_SECONDS = 1.0


def doctor(
    folder: Annotated[
        Path, typer.Argument(help="Folder whose disk is measured, for example that of your models.")
    ] = Path(),
    disk: Annotated[bool, typer.Option(help="Measure the disk: writes a temporary file of 268 MB.")] = True,
    as_json: options.Json = False,
) -> None:
    """Show CPU, memory, disk speed and backends, and how to fix what is slow."""
    with Bar() as bar:
        bar.update("Measuring the disk")
        facts = examine(folder, disk)
    print(json.dumps(facts, indent=2) if as_json else "\n".join(lines(facts)))


def examine(folder: Path, probe: bool) -> dict[str, Any]:
    """Everything as plain values."""
    from importlib.metadata import version  # noqa: PLC0415

    from moestream import system  # noqa: PLC0415
    from moestream.bench.ceilings import INSTALL, active_isa, native  # noqa: PLC0415
    from moestream.errors import BackendError, CheckpointError  # noqa: PLC0415

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder")
    memory, place = system.memory(), system.file_system(folder)
    facts: dict[str, Any] = {
        "moestream": version("moestream"),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": {
            "name": system.cpu_name(),
            "cores": os.cpu_count(),
            "usable": system.cpu_count(),
            "isa": None,
            "isa_supported": [],
        },
        "memory": {
            "total": memory.total,
            "available": memory.available,
            "cgroup_limit": memory.cgroup_limit,
            "default_budget": system.default_budget(),
        },
        "disk": {
            "folder": str(folder.resolve()),
            "file_system": place.kind,
            "free": place.free,
            "direct": None,
            "bytes_per_s_1mb": None,
            "bytes_per_s_8mb": None,
        },
    }
    try:
        module = native()
    except BackendError:
        facts["backends"] = _backends("slow fallback: the native kernels are not installed")
        facts["fix"] = INSTALL
        return facts
    facts["cpu"] |= {"isa": active_isa(), "isa_supported": list(module.supported_isas())}
    facts["backends"] = _backends(None)
    if probe:
        facts["disk"] |= _probe(folder)
    return facts


def _backends(cpu_problem: str | None) -> dict[str, dict[str, Any]]:
    planned = "planned, not in this version"
    return {
        "cpu": {"available": cpu_problem is None, "note": cpu_problem or "native kernels"},
        "reference": {"available": True, "note": "numpy, slow: used where the native kernels are missing"},
        "gpu": {"available": False, "note": planned},
        "metal": {"available": False, "note": planned},
    }


def _probe(folder: Path) -> dict[str, Any]:
    """Write a file and read it back past the page cache."""
    from moestream.bench.ceilings import disk_rates, scratch_file  # noqa: PLC0415

    with scratch_file(folder) as file:
        rates = disk_rates(file, PROBE_SECONDS)
    return {"direct": rates.direct, "bytes_per_s_1mb": rates.small, "bytes_per_s_8mb": rates.large}


def lines(f: dict[str, Any]) -> list[str]:
    """The facts for people."""
    cpu, memory, disk = f["cpu"], f["memory"], f["disk"]
    limit = memory["cgroup_limit"]
    isa = f"{cpu['isa']} in use; supported: {', '.join(cpu['isa_supported'])}" if cpu["isa"] else "no native kernels"
    rows = [
        ("moestream", f"{f['moestream']}, Python {f['python']}, {f['os']}"),
        ("cpu", f"{cpu['name']}: {cpu['usable']} of {cpu['cores']} cores usable (affinity and cgroup quota)"),
        ("isa", isa),
        (
            "memory",
            f"{format_size(memory['total'])}, {format_size(memory['available'])} available; "
            f"cgroup limit {format_size(limit) if limit else 'none'}; default --ram "
            f"{format_size(memory['default_budget'])}",
        ),
        ("disk", f"{disk['folder']} ({disk['file_system'] or 'unknown'}, {format_size(disk['free'])} free)"),
    ]
    if disk["direct"] is not None:
        kind = (
            "direct reads"
            if disk["direct"]
            else "buffered: this file system refuses direct reads; cached, not the disk"
        )
        small, large = (disk[f"bytes_per_s_{size}mb"] / 1e9 for size in (1, 8))
        rows.append(("", f"{small:.2f} GB/s at 1 MB, {large:.2f} GB/s at 8 MB ({kind})"))
    for name, backend in f["backends"].items():
        rows.append(("backend", f"{name:9} {'yes' if backend['available'] else 'no ':3} {backend['note']}"))
    if "fix" in f:
        rows.append(("fix", f["fix"]))
    return [f"{name:10}{text}" for name, text in rows]
