"""Anthropic's ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from moestream.server.chat import Chat, ChatRequest, Choice, ToolUse, begin
from moestream.server.constraints import check_schema
from moestream.server.errors import ApiError, as_api_error, error_body, json_response
from moestream.server.schemas import (
    Body,
    Effort,
    Function,
    FunctionName,
    Int,
    Label,
    Parts,
    StopTexts,
    TextPart,
    as_tool,
    caller_of,
    joined,
    new_id,
    receipts_of,
    thinking_variables,
    token_counts,
)
from moestream.server.service import Service
from moestream.server.settings import MAX_TOOLS
from moestream.server.sse import EventStream, event, unless_gone
from moestream.text.reply_reader import CallArguments, CallEnd, CallStart, Content, Event, Reasoning

PATH = "/v1/messages"
PING = event({"type": "ping"}, "ping")


class ToolUseBlock(Body):
    """A call in the history."""

    type: Literal["tool_use"]
    id: str
    name: FunctionName
    input: dict[str, Any]
    cache_control: Label = None


class ToolResultBlock(Body):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Parts | None = None
    is_error: bool | None = None
    cache_control: Label = None


class ThinkingBlock(Body):
    """What the assistant has thought."""

    type: Literal["thinking"]
    thinking: str
    signature: Label = None


Block = Annotated[TextPart | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]


class Message(Body):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=4096, fail_fast=True)]


class Tool(Body):
    """A function that the model may call."""

    name: FunctionName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Label = None


class Choose(Body):
    """Whether and which tool must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether and how long the model thinks."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[Int, Field(ge=1)] | None = None
    display: Literal["summarized"] | None = None


class OutputFormat(Body):
    """The schema of the reply."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    """What the reply must be."""

    effort: Effort | None = None
    format: OutputFormat | None = None


class CountBody(Body):
    """The body of ``/v1/messages/count_tokens``."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=16384, fail_fast=True)]
    system: str | Parts | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Choose | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Label = None


class MessagesBody(CountBody):
    """The body of ``/v1/messages``."""

    max_tokens: Annotated[Int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=0)] | None = None
    stop_sequences: StopTexts | None = None
    stream: bool | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    metadata: Label = None


async def messages(service: Service, body: MessagesBody, request: Request) -> Response:
    """Answer a conversation."""
    service.check_model(body.model)
    params = service.params(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
    )
    thinking = body.thinking
    budget = thinking.budget_tokens if thinking is not None and thinking.type == "enabled" else None
    use, variables = _tool_use(body), _variables(service, body)
    user = body.metadata.get("user_id") if isinstance(body.metadata, dict) else None
    caller = caller_of(request, service.settings, user)
    conversation = ChatRequest(_messages(body), [params], use, _schema(body), variables, budget, caller)
    chat = await begin(service, conversation)
    reply_id = new_id("msg_")
    request.scope["moestream"].watch(chat.generation, reply_id)
    if body.stream:
        return EventStream(_stream(chat, reply_id, body), PING, service.settings.ping_seconds, chat.close)
    try:
        await unless_gone(request.receive, chat.finish())
    finally:
        chat.close()
    choice = chat.choices[0]
    answer = _head(reply_id, body) | {"content": _content(choice), "usage": _usage(chat)}
    return json_response(answer | {"stop_reason": _stop_reason(choice), "stop_sequence": choice.stop})


async def count_tokens(service: Service, body: CountBody, request: Request) -> Response:
    """Count the tokens of a conversation without answering it."""
    service.check_model(body.model)
    prompt = await service.chat_prompt(_messages(body), _tool_use(body).shown, _variables(service, body))
    return json_response({"input_tokens": len(prompt.ids)})


def _tool_use(body: CountBody) -> ToolUse:
    tools = [
        as_tool(Function(name=tool.name, description=tool.description, parameters=tool.input_schema))
        for tool in body.tools or ()
    ]
    choose = body.tool_choice
    if choose is None:
        return ToolUse(tools, strict=any(tool.strict for tool in body.tools or ()))
    if choose.type == "tool" and choose.name is None:
        raise ApiError(400, "tool_choice.name is missing", param="tool_choice.name")
    choice = {"any": "required", "tool": choose.name or ""}.get(choose.type, choose.type)
    return ToolUse(
        tools,
        choice,
        param="tool_choice.name",
        strict=any(tool.strict for tool in body.tools or ()),
        parallel=not choose.disable_parallel_tool_use,
    )


def _variables(service: Service, body: CountBody) -> dict[str, Any]:
    effort = body.output_config.effort if body.output_config else None
    param = "output_config.effort"
    if body.thinking is not None and (effort is None or body.thinking.type == "disabled"):
        effort, param = "none" if body.thinking.type == "disabled" else "high", "thinking"
    return thinking_variables(service.loaded.template, effort, param)


def _schema(body: CountBody) -> dict[str, Any] | None:
    if body.output_config is None or body.output_config.format is None:
        return None
    schema = body.output_config.format.schema_
    check_schema(schema, "output_config.format.schema")
    return schema


def _messages(body: CountBody) -> list[dict[str, Any]]:
    """The conversation as chat templates expect it: results of calls are messages of their own there."""
    result: list[dict[str, Any]] = []
    if body.system:
        result.append({"role": "system", "content": joined(body.system)})
    for index, message in enumerate(body.messages):
        if isinstance(message.content, str):
            result.append({"role": message.role, "content": message.content})
        else:
            result += _split(message.role, message.content, f"messages.{index}.content")
    return result


def _split(role: str, blocks: list[Block], param: str) -> Iterator[dict[str, Any]]:
    """The messages that one message of blocks becomes."""
    texts: list[str] = []
    own: dict[str, Any] = {"role": role}
    for block in blocks:
        match block:
            case TextPart():
                texts.append(block.text)
            case ToolResultBlock() if role == "user":
                text = f"Error: {joined(block.content)}" if block.is_error else joined(block.content)
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
            case ToolUseBlock() if role == "assistant":
                function = {"name": block.name, "arguments": block.input}
                own.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
            case ThinkingBlock() if role == "assistant":
                own["reasoning_content"] = own.get("reasoning_content", "") + block.thinking
            case _:
                raise ApiError(400, f"{param}: a block of type {block.type} is not the {role}'s", param=param)
    if texts or len(own) > 1 or not blocks:
        yield {**own, "content": "\n".join(texts)}


def _head(reply_id: str, body: MessagesBody) -> dict[str, Any]:
    return {
        "id": reply_id,
        "type": "message",
        "role": "assistant",
        "model": body.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _usage(chat: Chat) -> dict[str, Any]:
    receipts = chat.receipts
    _, cached, new = token_counts(receipts)
    return {
        "input_tokens": len(chat.generation.jobs[0].ids) - cached,  # without what was cached, as Anthropic counts
        "output_tokens": new,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens_details": {"thinking_tokens": chat.choices[0].reasoning_tokens},
        "receipts": receipts_of(receipts),
    }


def _stop_reason(choice: Choice) -> str:
    if choice.finish_reason == "length":
        return "max_tokens"
    if choice.stop is not None:
        return "stop_sequence"
    return "tool_use" if choice.gathered.calls else "end_turn"


def _content(choice: Choice) -> list[dict[str, Any]]:
    """The blocks of a whole reply."""
    got = choice.gathered
    blocks: list[dict[str, Any]] = []
    if got.reasoning:
        blocks.append({"type": "thinking", "thinking": got.reasoning, "signature": ""})
    if got.content or not (got.calls or got.reasoning):
        blocks.append({"type": "text", "text": got.content})
    for call in got.calls:
        try:
            blocks.append(
                {"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": json.loads(call.arguments)}
            )
        except (ValueError, RecursionError):  # cut off by max_tokens, or malformed
            blocks.append({"type": "text", "text": f"{call.name}({call.arguments}"})
    return blocks


@dataclass(slots=True)
class _Blocks:
    """Turns events of a reply into those of Anthropic's streams: one block after the other."""

    index: int = -1
    kind: str = ""

    def take(self, change: Event) -> Iterator[str]:
        """What an event means for the client."""
        match change:
            case Reasoning(text):
                yield from self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case Content(text):
                yield from self._open("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case CallStart(_, name):
                yield from self.close()
                block = {"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": {}}
                yield from self._open("tool_use", block)
            case CallArguments(_, text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case CallEnd():
                yield from self.close()

    def close(self) -> Iterator[str]:
        """The open block is complete."""
        if self.kind:
            self.kind = ""
            yield event({"type": "content_block_stop", "index": self.index}, "content_block_stop")

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[str]:
        if kind != self.kind:
            yield from self.close()
            self.index += 1
            self.kind = kind
            start = {"type": "content_block_start", "index": self.index, "content_block": block}
            yield event(start, "content_block_start")

    def _delta(self, delta: dict[str, Any]) -> str:
        return event({"type": "content_block_delta", "index": self.index, "delta": delta}, "content_block_delta")


async def _stream(chat: Chat, reply_id: str, body: MessagesBody) -> AsyncGenerator[str]:
    """The events of a streamed answer."""
    blocks, choice = _Blocks(), chat.choices[0]
    try:
        yield event(
            {"type": "message_start", "message": _head(reply_id, body) | {"usage": _usage(chat)}}, "message_start"
        )
        async for _, events, _ in chat.events():
            for change in events:
                for data in blocks.take(change):
                    yield data
        for data in blocks.close():
            yield data
        delta = {"stop_reason": _stop_reason(choice), "stop_sequence": choice.stop}
        yield event({"type": "message_delta", "delta": delta, "usage": _usage(chat)}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")
    except Exception as error:  # the status has been sent: all that is left is to say it here
        yield event(error_body(as_api_error(error), PATH), "error")
