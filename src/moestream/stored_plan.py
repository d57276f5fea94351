"""What ``moestream plan --measure`` found best for a model on this machine, one JSON file a model.

A stored plan caps the expert slots and picks the cache mode; it never raises the memory budget.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import platformdirs

from moestream import system
from moestream.config import CacheMode, RunConfig

VERSION = 1
FOLDER_VARIABLE = "MOESTREAM_PLANS"
"""Environment variable: another folder for the plans."""


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """The best way to cache one model on one machine, and how it was found."""

    cache: CacheMode
    slots: int
    """Expert slots at most; staging slots in mode ``page``."""
    ram: int
    """Bytes of the whole process when it was measured: what ``--ram`` would ask for."""
    date: str
    """ISO 8601, UTC."""
    machine: dict[str, Any]
    """``machine_fingerprint()`` of where it was measured."""
    model: str
    """``model_fingerprint()`` of the folder then."""
    measured: dict[str, Any]
    """Every figure behind the choice."""
    version: int = VERSION

    def __post_init__(self) -> None:
        """Reject what was not written by ``save``: the file is the user's, and may have been edited or cut short.

        Raises:
            ValueError: a field has a wrong type or value; the message names it.
        """
        if self.version != VERSION:
            raise ValueError(f"version is {self.version!r}, this moestream writes {VERSION}")
        if self.cache not in ("arena", "hybrid", "page"):
            raise ValueError(f"cache is {self.cache!r}, not arena, hybrid or page")
        kinds = {"slots": int, "ram": int, "date": str, "machine": dict, "model": str, "measured": dict}
        for name, kind in kinds.items():
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} is {getattr(self, name)!r}")
        if self.slots < 1 or self.ram < 1:
            raise ValueError(f"slots {self.slots} and ram {self.ram} must be positive")

    @property
    def day(self) -> str:
        """The date without the time."""
        return self.date[:10]


def machine_fingerprint() -> dict[str, Any]:
    """What makes measurements of two machines differ; memory in GiB, because totals move by a few pages at boot."""
    memory = system.memory()
    return {
        "cpu": system.cpu_name(),
        "cores": system.cpu_count(),
        "memory_gib": round(memory.total / 2**30),
        "cgroup_limit": memory.cgroup_limit,
        "os": platform.system(),
    }


def model_fingerprint(folder: Path) -> str:
    """Hash of ``config.json`` and of the names and sizes of the weight files; reads no weights."""
    state = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        state.update(f"{file.name} {file.stat().st_size}\n".encode())
    return state.hexdigest()


def plan_file(folder: Path) -> Path:
    """Where the plan of a model folder is kept; the host is part of the name, for homes that several machines share."""
    root = os.environ.get(FOLDER_VARIABLE)
    plans = Path(root) if root else platformdirs.user_config_path("moestream") / "plans"
    real = folder.resolve()
    key = hashlib.sha256(f"{platform.node()}\n{real}".encode()).hexdigest()[:12]
    return plans / f"{re.sub(r'[^A-Za-z0-9._-]', '_', real.name)[:80]}-{key}.json"


def save(folder: Path, plan: StoredPlan) -> Path:
    """Write the plan of a model folder, replacing an earlier one whole or not at all; returns the file.

    Raises:
        OSError: it cannot be written.
    """
    path = plan_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def forget(folder: Path) -> bool:
    """Remove the plan of a model folder; False if there was none."""
    path = plan_file(folder)
    found = path.exists()
    path.unlink(missing_ok=True)
    return found


def find(folder: Path) -> StoredPlan | None:
    """The plan of a model folder; None if there is none, or, with a warning, if it is damaged or no longer applies."""
    path = plan_file(folder)
    try:
        return _checked(path, folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(
            f"stored plan ignored: {path}: {error}. Measure again with `moestream plan MODEL --measure`, or remove it "
            "with `moestream plan MODEL --forget`",
            stacklevel=3,
        )
        return None


def _checked(path: Path, folder: Path) -> StoredPlan:
    """Read a plan, as long as it is whole and of this machine and model."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("is not a JSON object")
    if missing := [f.name for f in fields(StoredPlan) if f.name not in values]:
        raise ValueError(f"field {missing[0]} is missing")
    plan = StoredPlan(**{f.name: values[f.name] for f in fields(StoredPlan)})
    here, there = machine_fingerprint(), plan.machine
    if changed := [f"{key} was {there.get(key)}, is {here[key]}" for key in here if there.get(key) != here[key]]:
        raise ValueError(f"measured on another machine ({'; '.join(changed)})")
    if plan.model != model_fingerprint(folder):
        raise ValueError("the model's files have changed since")
    return plan


def follow(run: RunConfig, folder: Path) -> tuple[RunConfig, StoredPlan | None]:
    """Settle the cache mode: what the flags say, else a stored plan, else ``arena``.

    Returns:
        The settings with ``cache`` set, and the plan that they follow, if any.
    """
    plan = find(folder) if run.stored_plan and run.cache is None and run.ram is None else None
    return replace(run, cache=plan.cache if plan else run.cache or "arena"), plan
