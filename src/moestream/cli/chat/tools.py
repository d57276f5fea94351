"""Functions of a Python file as tools: schemas from their type hints, and calls checked against them."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError, validate_call

from moestream.errors import ConfigError

MAX_RESULT = 20_000
"""Characters of a result that the model gets to read."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call."""

    name: str
    function: Callable[..., Any]
    """Checks its arguments."""
    schema: Mapping[str, Any]
    """As chat templates expect it."""

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """Call the function; whatever goes wrong is a text for the model, too."""
        try:
            result = self.function(**arguments)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
            return f"error: the arguments are wrong: {'; '.join(wrong)}"
        except (Exception, SystemExit) as error:
            return f"error: {type(error).__name__}: {error}"
        text = result if isinstance(result, str) else _as_json(result)
        cut = f"\n[cut here; {len(text)} characters in all]" if len(text) > MAX_RESULT else ""
        return text[:MAX_RESULT] + cut


def load_tools(path: Path) -> dict[str, Tool]:
    """The public functions that a file defines, by name. The file is run.

    Raises:
        ConfigError: it cannot be run, or a function lacks a docstring or a usable type hint.
    """
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"--tools: {path} is no Python file; write functions with type hints and docstrings into one")
    spec = importlib.util.spec_from_file_location(f"moestream_tools_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # hints in quotes are looked up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"--tools: {path} failed: {type(error).__name__}: {error}") from error
    functions = [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == spec.name and not name.startswith("_")
    ]
    if not functions:
        raise ConfigError(f"--tools: {path} defines no function without a leading underscore")
    return {function.__name__: _tool(path, function) for function in functions}


def _tool(path: Path, function: Callable[..., Any]) -> Tool:
    name = function.__name__
    doc = inspect.getdoc(function)
    if not doc:
        raise ConfigError(f"--tools: {path}: {name} needs a docstring, which tells the model what it is for")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"--tools: {path}: {name} is async; only plain functions can be called")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"--tools: {path}: {name}: {parameter} cannot be filled by a model")
        if parameter.annotation is parameter.empty:
            raise ConfigError(f"--tools: {path}: {name}: {parameter.name} needs a type hint")
    try:
        checked = validate_call(function)
        adapter: TypeAdapter[Any] = TypeAdapter(cast(Any, checked))
        parameters = adapter.json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError, NameError) as error:
        raise ConfigError(f"--tools: {path}: {name}: {str(error).splitlines()[0]}") from error
    parameters.pop("additionalProperties", None)
    for schema in parameters.get("properties", {}).values():
        schema.pop("title", None)  # the name once more
    wrapped = {"type": "function", "function": {"name": name, "description": doc, "parameters": parameters}}
    return Tool(name, checked, wrapped)


def _as_json(result: Any) -> str:
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(result)
