"""What the request bodies of all APIs share."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from starlette.requests import Request

from moestream.engine.receipt import Receipt
from moestream.engine.sequence import Caller
from moestream.server.constraints import check_schema
from moestream.server.errors import ApiError, unsupported
from moestream.server.settings import MAX_STOP, MAX_STOP_LENGTH, MAX_TOOLS, ServeSettings
from moestream.text.tool_formats import parameters_of


def _whole(value: Any) -> Any:
    """1.0 is a whole number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _boolean(value: Any) -> Any:
    """0 equals False in Python, not in JSON."""
    if not isinstance(value, bool):
        raise ValueError("must be false")
    return value


Never = Annotated[Literal[False], BeforeValidator(_boolean)]
"""A switch that cannot be turned on here."""
Int = Annotated[int, BeforeValidator(_whole)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOP, fail_fast=True)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
Label = Annotated[Any, Field(description="Accepted as the client's own label; has no effect.")]
Priority = Annotated[
    Int,
    Field(
        ge=-1000,
        le=1000,
        description="Lower goes first; above 0 can wait: a place is kept from it. Below 0 takes --allow-priority.",
    ),
]
LogitBias = Annotated[
    dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Body(BaseModel):
    """A JSON object in which every parameter is known; numbers are numbers and texts are texts."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_says_nothing(cls, value: Any) -> Any:
        """Clients that write out every field they know say null where nothing is meant."""
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = (name for name, entry in value.items() if entry is not None and name not in known)
        named = {*known, *itertools.islice(unknown, 1)}  # the first is reported, a million would fill the memory
        return {name: entry for name, entry in value.items() if name in named}


class TextPart(Body):
    """A piece of text."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None = None
    logprobs: Label = None
    cache_control: Label = None
    citations: Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None = None


Parts = Annotated[list[TextPart], Field(max_length=4096, fail_fast=True)]


def joined(content: str | Sequence[TextPart] | None) -> str:
    """The text of a message."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


class Function(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool as ``/v1/chat/completions`` takes it."""

    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


def as_tool(function: Function) -> dict[str, Any]:
    """A function as chat templates expect it; its schema is checked.

    Raises:
        ApiError: the schema is malformed, too deep or too large.
    """
    value = function.model_dump(exclude_none=True, include={"name", "description", "parameters"})
    param = f"tools.{function.name}.parameters"
    check_schema(value.get("parameters", {}), param)
    schema = parameters_of(value)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not all(isinstance(s, dict | bool) for s in properties.values()):
        raise ApiError(400, f"{param}: properties must be an object of JSON schemas", param=param)
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ApiError(400, f"{param}: required must be a list of names", param=param)
    return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, **value}}


def chosen_tools(tools: Iterable[Mapping[str, Any]], name: str, param: str) -> list[Mapping[str, Any]]:
    """The one tool that must be called.

    Raises:
        ApiError: there is no such tool.
    """
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        raise ApiError(400, f"{param}: there is no tool named {name!r}", param=param)
    return found


def thinking_variables(template: str, effort: str | None, param: str) -> dict[str, Any]:
    """Template variables that turn thinking on or off.

    Args:
        template: Source of the chat template.
        effort: ``"none"`` is off; None says nothing.
        param: Name for errors.

    Raises:
        ApiError: the template has no such switch.
    """
    if effort is None:
        return {}
    if "reasoning_effort" in template and effort != "none":
        return {"reasoning_effort": effort}
    if "enable_thinking" in template:
        return {"enable_thinking": effort != "none"}
    if effort == "none" and "<think>" not in template:
        return {}  # it never thinks
    raise unsupported(param, "this model's chat template has no switch for thinking")


def caller_of(request: Request, settings: ServeSettings, label: object = None, priority: int | None = None) -> Caller:
    """Whose request it is: an address with the user it names, or with its program if it names none.

    Args:
        request: The request.
        settings: Of the server.
        label: The field that names the user, if the body has one.
        priority: Lower goes first.

    Raises:
        ApiError: it asks to go before others, and the server does not let it.
    """
    if priority is not None and priority < 0 and not settings.allow_priority:
        raise unsupported("priority", "below 0 goes before everybody else, which takes --allow-priority on the server")
    name = label if isinstance(label, str) and label else request.headers.get("user-agent", "")
    return Caller(f"{request.client.host if request.client else ''} {name[:256]}", priority or 0)


def biases(given: Mapping[str, float] | None) -> dict[int, float] | None:
    """Logit biases by token id."""
    return None if given is None else {int(token): value for token, value in given.items()}


def new_id(prefix: str) -> str:
    """An id for a response, a call or an item."""
    return f"{prefix}{uuid.uuid4().hex[:24]}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def receipts_of(receipts: Mapping[int, Receipt]) -> list[dict[str, Any]]:
    """The receipts of a request, one for each reply."""
    return [receipts[index].to_dict() for index in sorted(receipts)]


def token_counts(receipts: Mapping[int, Receipt], prompts: int = 1) -> tuple[int, int, int]:
    """(prompt tokens, those of them that were cached, new tokens); ``prompts`` prompts were answered equally often."""
    values = list(receipts.values())
    share = prompts / max(1, len(values))
    prompt, cached = sum(r.prompt_tokens for r in values), sum(r.cached_tokens for r in values)
    return round(share * prompt), round(share * cached), sum(r.new_tokens for r in values)
