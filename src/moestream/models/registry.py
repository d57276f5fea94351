"""Finds the architecture of a checkpoint by its ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from moestream.errors import ModelConfigError
from moestream.models import qwen3_5_moe, qwen3_moe
from moestream.models.config import Fields, ModelConfig
from moestream.models.names import TensorNames

ARCHITECTURES: dict[str, ModuleType] = {
    model_type: module for module in (qwen3_5_moe, qwen3_moe) for model_type in module.MODEL_TYPES
}


def parse_config(config: Mapping[str, Any]) -> tuple[ModelConfig, TensorNames]:
    """Describe the model of a parsed ``config.json`` and say what its tensors are called.

    Raises:
        ModelConfigError: the ``model_type`` is missing or not supported, or a field of it is wrong.
    """
    root = Fields(config)
    model_type = root.get("model_type")
    if model_type is None:
        raise root.error("model_type", "is missing")
    module = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if module is None:
        raise ModelConfigError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    parsed: ModelConfig = module.parse(root)
    names: TensorNames = module.NAMES
    return parsed, names
