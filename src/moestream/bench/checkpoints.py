"""Synthetic checkpoints of true geometry, written once and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import platformdirs

from moestream.checkpoint.geometry import geometry
from moestream.checkpoint.synthetic import write_synthetic


def synthetic_folder(
    name: str, layers: int | None, root: Path | None, progress: Callable[[int, int], None]
) -> tuple[Path, bool]:
    """The folder of a synthetic checkpoint, written now unless it exists.

    Args:
        name: A published shape, see ``checkpoint/geometry.py``.
        layers: Instead of the published number.
        root: Where to keep checkpoints; None: the user's cache folder.
        progress: Called with bytes written and bytes in all.

    Returns:
        The folder, and whether it was written now.

    Raises:
        ConfigError: the name is unknown, or the layers are below 1.
        CheckpointError: the disk has too little room.
    """
    config = geometry(name, layers)
    count = config.get("text_config", config)["num_hidden_layers"]
    root = root or platformdirs.user_cache_path("moestream") / "synthetic"
    folder = root / f"{name}-{count}layers"
    if (folder / "config.json").exists():
        return folder, False
    write_synthetic(folder, name, layers, progress=progress)
    return folder, True
