"""How to sample: what a model's ``generation_config.json`` recommends, and what a caller changes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestream.engine.sampling import SamplingParams
from moestream.errors import CheckpointError, RequestError
from moestream.text.tokenizer import read_json


def recommended_params(folder: Path) -> SamplingParams:
    """Sampling as ``generation_config.json`` recommends; defaults where it says nothing.

    Raises:
        CheckpointError: the file holds values that cannot be used.
    """
    values = read_json(folder / "generation_config.json")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    chosen: dict[str, Any] = {name: values[name] for name in names if values.get(name) is not None}
    if chosen.get("top_k") == -1:  # a common way to say off
        chosen["top_k"] = 0
    if values.get("do_sample") is False:
        chosen["temperature"] = 0.0
    try:
        return SamplingParams(**chosen)
    except RequestError as error:
        raise CheckpointError(f"{folder / 'generation_config.json'}: {error}") from error


def changed(params: SamplingParams, changes: Mapping[str, Any]) -> SamplingParams:
    """``params`` with some of its fields changed.

    Raises:
        RequestError: ``params`` is something else, a field has no such name, or a value is wrong.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params must be SamplingParams, got {type(params).__name__}; or give keyword arguments")
    known = [f.name for f in dataclasses.fields(SamplingParams)]
    if unknown := sorted(set(changes) - set(known)):
        raise RequestError(f"unknown sampling parameter {', '.join(unknown)}; known: {', '.join(known)}")
    return dataclasses.replace(params, **changes)
