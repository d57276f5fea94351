"""Synthetic checkpoints of true geometry, written once and kept; and models deeper than the disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs

from moestream.checkpoint.geometry import geometry
from moestream.checkpoint.index import Checkpoint
from moestream.checkpoint.layouts import read_quantization
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


def repeated(checkpoint: Checkpoint, times: int) -> Checkpoint:
    """The same checkpoint with its layers ``times`` over: deeper than the disk holds, for measuring only.

    Every layer has experts of its own, which are read, kept and dropped for it alone, though the bytes of some lie at
    the same place of the file; direct reads fetch them from the disk each time.
    """
    if times == 1:
        return checkpoint
    config = {**checkpoint.config}
    if "text_config" in config:
        config["text_config"] = text = {**config["text_config"]}
    else:
        text = config
    layers = text["num_hidden_layers"]
    text["num_hidden_layers"] = layers * times
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"] * times
    if "mlp_only_layers" in text:
        text["mlp_only_layers"] = [i + layers * again for again in range(times) for i in text["mlp_only_layers"]]
    for name in ("quantization", "quantization_config"):
        if name in config:
            config[name] = _renamed(config[name], layers, times)
    tensors = {name: entry._replace(name=name) for name, entry in _renamed(checkpoint.tensors, layers, times).items()}
    quantization = read_quantization(config, str(checkpoint.path / "config.json"))
    return replace(checkpoint, config=config, tensors=MappingProxyType(tensors), quantization=quantization)


def _renamed(values: Mapping[str, Any], layers: int, times: int) -> dict[str, Any]:
    """What belongs to layer i again under the names of layers i + layers, i + 2 * layers and so on."""
    found = dict(values)
    for name, value in values.items():
        parts = re.fullmatch(r"(.*\blayers\.)(\d+)(\..*)", name)
        for again in range(1, times if parts else 1):
            assert parts is not None
            found[f"{parts[1]}{int(parts[2]) + layers * again}{parts[3]}"] = value
    return found
