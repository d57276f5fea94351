"""Read a reply: what the model thought, what it said, and which functions it called.

Two forms of call are understood, both between ``<tool_call>`` and ``</tool_call>``: a JSON object with ``name`` and
``arguments`` (Hermes, Qwen3), and ``<function=name><parameter=key>value</parameter></function>`` (Qwen3.5).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of a reply."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """The parts of a reply. A malformed call stays in ``content`` as the model wrote it."""

    content: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


def parse_reply(
    text: str, tools: Sequence[Mapping[str, Any]] | None = None, *, in_thought: bool = False
) -> ParsedReply:
    """Split a reply into reasoning, content and tool calls.

    Args:
        text: The reply as generated.
        tools: Schemas given to the model; they tell a number from a text in the second form.
        in_thought: The prompt already ended with ``<think>``, so the reply starts inside it.
    """
    reasoning, rest = _split_thought(text, in_thought)
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        call = parse_call(match[1], tools or ())
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    content = CALL.sub(take, rest)
    return ParsedReply(content.strip() if calls or reasoning is not None else content, reasoning, tuple(calls))


def _split_thought(text: str, in_thought: bool) -> tuple[str | None, str]:
    start = text.lstrip()
    if start.startswith("<think>"):
        start, in_thought = start.removeprefix("<think>"), True
    if not in_thought:
        return None, text
    thought, end, rest = start.partition("</think>")
    return thought.strip(), rest if end else ""


def parse_call(body: str, tools: Sequence[Mapping[str, Any]]) -> ToolCall | None:
    """What stands between the tags of a call; None when it is neither of the two forms."""
    function = FUNCTION.fullmatch(body)
    if function is not None:
        name = function[1].strip()
        types = parameter_types(name, tools)
        return ToolCall(
            name,
            {key.strip(): parameter_value(raw, types.get(key.strip())) for key, raw in PARAMETER.findall(function[2])},
        )
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # some models write the arguments as a JSON text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return ToolCall(call["name"], arguments) if isinstance(arguments, dict) else None


def parameter_types(name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Declared JSON types of a function's parameters."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            if isinstance(properties, Mapping):
                return {key: schema.get("type") for key, schema in properties.items() if isinstance(schema, Mapping)}
    return {}


def parameter_value(raw: str, declared: Any) -> Any:
    """A parameter's value: text where text is declared, else JSON if it is JSON, else text."""
    if declared == "string":
        return raw
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw
