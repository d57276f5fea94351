"""From what the user calls a model to its folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from moestream.errors import CheckpointError

DEMO = "demo"
SHOWN = 200
"""Characters of a wrong name that an error repeats: it may be a whole prompt."""


def find_model(model: str | Path) -> Path:
    """The folder of a model.

    Args:
        model: ``"demo"`` for the one in the package, a folder, or the id of a model in the Hugging Face cache.

    Raises:
        CheckpointError: there is no such folder; says how to get it.
    """
    if model == DEMO:
        folder = Path(__file__).parents[1] / "demo"
        if not os.path.isfile(folder / "config.json"):
            raise CheckpointError(f"the demo model is not part of this installation ({folder} has no config.json)")
        return folder
    name = str(model)
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # unlike Path.is_dir, it takes any string: too long, forbidden, or with a NUL
        return Path(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not os.path.exists(path):
        cached = _cached_model(name)
        if cached is None:
            raise CheckpointError(f"{_shown(name)} is neither a folder nor downloaded; get it with: hf download {name}")
        return cached
    raise CheckpointError(f"{_shown(path)} is not a model folder (config.json and *.safetensors files)")


def _cached_model(name: str) -> Path | None:
    """The snapshot of a model that ``hf download`` has put into its cache; places as ``huggingface_hub`` has them."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    root = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    repository = Path(os.path.expandvars(os.path.expanduser(root))) / f"models--{name.replace('/', '--')}"
    try:
        snapshot = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return snapshot if os.path.isdir(snapshot) else None


def _shown(name: str) -> str:
    short = name if len(name) <= SHOWN else f"{name[:SHOWN]}..."
    return short if short.isprintable() else repr(short)
