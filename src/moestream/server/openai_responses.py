"""OpenAI's ``/v1/responses``, without a memory: every request holds the whole conversation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from moestream.server.chat import Chat, ChatRequest, ToolUse, begin
from moestream.server.constraints import ANY_OBJECT, check_schema
from moestream.server.errors import ApiError, as_api_error, error_body, json_response
from moestream.server.schemas import (
    Body,
    Effort,
    Function,
    FunctionName,
    Int,
    Label,
    Never,
    Parts,
    Priority,
    as_tool,
    caller_of,
    joined,
    new_id,
    now,
    receipts_of,
    thinking_variables,
    token_counts,
)
from moestream.server.service import Service
from moestream.server.settings import MAX_TOOLS
from moestream.server.sse import EventStream, event, unless_gone
from moestream.text.reply_reader import CallArguments, CallEnd, CallStart, Content, Event, Reasoning

PATH = "/v1/responses"
PING = ": ping\n\n"


class Message(Body):
    """One message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: str | None = None
    status: Label = None
    phase: Label = None


class FunctionCall(Body):
    """A call in the history."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    id: str | None = None
    status: Label = None


class FunctionCallOutput(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Parts
    id: str | None = None
    status: Label = None


class ReasoningText(Body):
    """A piece of what the assistant has thought."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Body):
    """What the assistant has thought."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(max_length=4096, fail_fast=True)] | None = None
    status: Label = None


Item = Message | FunctionCall | FunctionCallOutput | ReasoningItem


class Tool(Function):
    """A function that the model may call."""

    type: Literal["function"]


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    name: FunctionName


class Format(Body):
    """What the reply must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class Text(Body):
    """What the text must be."""

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Body):
    """How the model thinks."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None


class StreamOptions(Body):
    """What a stream holds."""

    include_obfuscation: Never | None = None


class ResponsesBody(Body):
    """The body of ``/v1/responses``."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1, max_length=16384, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[Literal["reasoning.encrypted_content"]], Field(max_length=1)] | None = None
    store: Never | None = None
    background: Never | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=0)] | None = None
    priority: Priority | None = None
    user: Label = None
    metadata: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None


async def responses(service: Service, body: ResponsesBody, request: Request) -> Response:
    """Answer a conversation; nothing of it is stored."""
    service.check_model(body.model)
    chat = await begin(service, _request(service, body, request))
    items = _Items(_head(body))
    request.scope["moestream"].watch(chat.generation, items.response["id"])
    if body.stream:
        return EventStream(_stream(chat, items), PING, service.settings.ping_seconds, chat.close)

    async def answer() -> None:
        async for _, events, _ in chat.events():
            for change in events:
                for _ in items.take(change):
                    pass
        for _ in items.finish(chat):
            pass

    try:
        await unless_gone(request.receive, answer())
    finally:
        chat.close()
    return json_response(items.response)


def _request(service: Service, body: ResponsesBody, request: Request) -> ChatRequest:
    """The conversation as the model's side sees it.

    Raises:
        ApiError: a parameter cannot be honoured.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    params = service.params(temperature=body.temperature, top_p=body.top_p, max_tokens=body.max_output_tokens)
    choice = body.tool_choice or "auto"
    use = ToolUse(
        [as_tool(tool) for tool in body.tools or ()],
        choice if isinstance(choice, str) else choice.name,
        strict=any(tool.strict for tool in body.tools or ()),
        parallel=body.parallel_tool_calls is not False,
    )
    effort = body.reasoning.effort if body.reasoning else None
    variables = thinking_variables(service.loaded.template, effort, "reasoning.effort")
    caller = caller_of(request, service.settings, body.user or body.safety_identifier, body.priority)
    return ChatRequest(_messages(body), [params], use, _schema(body), variables, caller=caller)


def _schema(body: ResponsesBody) -> dict[str, Any] | None:
    wanted = body.text.format if body.text else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.schema_ is None:
        raise ApiError(400, "text.format.schema is missing", param="text.format.schema")
    check_schema(wanted.schema_, "text.format.schema")
    return wanted.schema_


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """The items as chat templates expect them: what the assistant did between two messages is one message there."""
    result: list[dict[str, Any]] = []
    if body.instructions:
        result.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*result, {"role": "user", "content": body.input}]

    def assistant() -> dict[str, Any]:
        if not result or result[-1]["role"] != "assistant":
            result.append({"role": "assistant", "content": ""})
        return result[-1]

    for item in body.input:
        match item:
            case Message(role="assistant"):
                message = assistant()
                message["content"] = "\n".join(filter(None, [message["content"], joined(item.content)]))
            case Message():
                role = "system" if item.role == "developer" else item.role
                result.append({"role": role, "content": joined(item.content)})
            case FunctionCall():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                assistant().setdefault("tool_calls", []).append(call)
            case FunctionCallOutput():
                result.append({"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output)})
            case ReasoningItem():
                assistant()["reasoning_content"] = "\n".join(part.text for part in item.content or ())
    return result


def _head(body: ResponsesBody) -> dict[str, Any]:
    """A response that has just begun."""
    given = body.model_dump(mode="json", by_alias=True)
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": now(),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "text": {"format": given["text"]["format"] if body.text and body.text.format else {"type": "text"}},
        "tool_choice": given["tool_choice"] or "auto",
        "tools": given["tools"] or [],
        "truncation": "disabled",
        "usage": None,
        **{name: given[name] for name in ("instructions", "max_output_tokens", "model", "metadata", "reasoning")},
        **{name: given[name] for name in ("temperature", "top_p", "user")},
    }


@dataclass(slots=True)
class _Items:
    """Builds the response, item by item, and tells a stream what happens."""

    response: dict[str, Any]
    sequence: int = 0
    item: dict[str, Any] | None = None
    """The one that is being written."""
    part: dict[str, Any] = field(default_factory=dict)
    """Its text, or for a call the item itself."""

    def tell(self, kind: str, **values: Any) -> str:
        """One event of the stream."""
        self.sequence += 1
        return event({"type": kind, "sequence_number": self.sequence - 1, **values}, kind)

    def take(self, change: Event) -> Iterator[str]:
        """What an event of the reply means."""
        match change:
            case Reasoning(text):
                yield from self._open(
                    "reasoning", {"id": new_id("rs_"), "summary": [], "content": []}, "reasoning_text"
                )
                yield self._add("text", text, "response.reasoning_text.delta", content_index=0)
            case Content(text):
                yield from self._open(
                    "message", {"id": new_id("msg_"), "role": "assistant", "content": []}, "output_text"
                )
                yield self._add("text", text, "response.output_text.delta", content_index=0, logprobs=[])
            case CallStart(_, name):
                yield from self.close()
                call = {"id": new_id("fc_"), "call_id": new_id("call_"), "name": name, "arguments": ""}
                yield from self._open("function_call", call, None)
            case CallArguments(_, text):
                yield self._add("arguments", text, "response.function_call_arguments.delta")
            case CallEnd():
                yield from self.close()

    def close(self, status: str = "completed") -> Iterator[str]:
        """The item is complete."""
        item = self.item
        if item is None:
            return
        at = {"item_id": item["id"], "output_index": len(self.response["output"]) - 1}
        if item["type"] == "function_call":
            yield self.tell(
                "response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"]
            )
        else:
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            yield self.tell(f"response.{kind}.done", **at, content_index=0, text=self.part["text"], **more)
            yield self.tell("response.content_part.done", **at, content_index=0, part=self.part)
        item["status"] = status
        self.item = None
        yield self.tell("response.output_item.done", output_index=at["output_index"], item=item)

    def finish(self, chat: Chat) -> Iterator[str]:
        """The reply has ended."""
        choice = chat.choices[0]
        cut = choice.finish_reason == "length"
        yield from self.close("incomplete" if cut else "completed")
        prompt, cached, new = token_counts(chat.receipts)
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "completed_at": now(),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
                "output_tokens": new,
                "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
                "total_tokens": prompt + new,
                "receipts": receipts_of(chat.receipts),
            },
        }
        yield self.tell("response.incomplete" if cut else "response.completed", response=self.response)

    def _open(self, kind: str, item: dict[str, Any], part: str | None) -> Iterator[str]:
        if self.item is not None and self.item["type"] == kind:
            return
        yield from self.close()
        self.item = self.part = {"type": kind, "status": "in_progress", **item}
        self.response["output"].append(self.item)
        index = len(self.response["output"]) - 1
        yield self.tell("response.output_item.added", output_index=index, item=self.item)
        if part is not None:
            self.part = {"type": part, "text": ""} | ({"annotations": []} if part == "output_text" else {})
            self.item["content"].append(self.part)
            at = {"item_id": self.item["id"], "output_index": index, "content_index": 0}
            yield self.tell("response.content_part.added", **at, part=self.part)

    def _add(self, key: str, text: str, kind: str, **more: Any) -> str:
        assert self.item is not None
        self.part[key] += text
        index = len(self.response["output"]) - 1
        return self.tell(kind, item_id=self.item["id"], output_index=index, delta=text, **more)


async def _stream(chat: Chat, items: _Items) -> AsyncGenerator[str]:
    """The events of a streamed answer."""
    try:
        yield items.tell("response.created", response=items.response)
        yield items.tell("response.in_progress", response=items.response)
        async for _, events, _ in chat.events():
            for change in events:
                for data in items.take(change):
                    yield data
        for data in items.finish(chat):
            yield data
    except Exception as error:  # the status has been sent: all that is left is to say it here
        problem = error_body(as_api_error(error), PATH)["error"]
        items.response |= {"status": "failed", "error": {"code": "server_error", "message": problem["message"]}}
        yield items.tell("response.failed", response=items.response)
