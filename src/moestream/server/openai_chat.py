"""OpenAI's ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from moestream.engine.sampling import TokenLogprobs
from moestream.server.chat import Chat, ChatRequest, Choice, ToolUse, begin, spread
from moestream.server.constraints import ANY_OBJECT, check_schema
from moestream.server.errors import ApiError, as_api_error, error_body, json_response
from moestream.server.schemas import (
    Body,
    Effort,
    FunctionName,
    Int,
    Label,
    LogitBias,
    Never,
    Parts,
    Priority,
    StopText,
    StopTexts,
    Tools,
    as_tool,
    biases,
    caller_of,
    joined,
    new_id,
    now,
    receipts_of,
    thinking_variables,
    token_counts,
)
from moestream.server.service import Service
from moestream.server.sse import EventStream, event, unless_gone
from moestream.text.reply_reader import CallArguments, CallStart, Content, Event, Reasoning
from moestream.text.tokenizer import Tokenizer

PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"
PATH = "/v1/chat/completions"


class CalledFunction(Body):
    """A function the assistant has called."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call in the history."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=1024, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None = None


class NamedFunction(Body):
    """The name of a function."""

    name: FunctionName


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A schema and its name."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What the reply must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Body):
    """What a stream holds."""

    include_usage: bool | None = None
    include_obfuscation: Never | None = None


class ChatBody(Body):
    """The body of ``/v1/chat/completions``."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=16384, fail_fast=True)]
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Int | None = None
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    n: Annotated[Int, Field(ge=1, le=128)] | None = None
    stop: StopText | StopTexts | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Tools | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: Never | None = None
    logit_bias: LogitBias | None = None
    priority: Priority | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    user: Label = None
    metadata: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None


async def chat_completions(service: Service, body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    service.check_model(body.model)
    reply_id, tokenizer = new_id("chatcmpl-"), service.loaded.tokenizer
    chat = await begin(service, _request(service, body, request))
    request.scope["moestream"].watch(chat.generation, reply_id)
    if body.stream:
        events = _stream(chat, reply_id, body, tokenizer)
        return EventStream(events, PING, service.settings.ping_seconds, chat.close)
    try:
        await unless_gone(request.receive, chat.finish())
    finally:
        chat.close()
    choices = [_choice(index, choice, body, tokenizer) for index, choice in enumerate(chat.choices)]
    return json_response(_head(reply_id, body, "chat.completion") | {"choices": choices, "usage": _usage(chat)})


def _request(service: Service, body: ChatBody, request: Request) -> ChatRequest:
    """The conversation as the model's side sees it.

    Raises:
        ApiError: a parameter cannot be honoured.
    """
    count = body.n or 1
    if count > service.settings.max_choices:
        raise ApiError(400, f"n is {count}, at most {service.settings.max_choices} are allowed", param="n")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    params = service.params(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=biases(body.logit_bias),
        seed=None if body.seed is None else body.seed & (2**63 - 1),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else body.stop,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    tools = [as_tool(tool.function) for tool in body.tools or ()]
    choice = body.tool_choice or "auto"
    return ChatRequest(
        messages=[_message(message, f"messages.{index}") for index, message in enumerate(body.messages)],
        params=spread(params, count),
        use=ToolUse(
            tools,
            choice if isinstance(choice, str) else choice.function.name,
            strict=any(tool.function.strict for tool in body.tools or ()),
            parallel=body.parallel_tool_calls is not False,
        ),
        schema=_schema(body.response_format),
        variables={
            **thinking_variables(service.loaded.template, body.reasoning_effort, "reasoning_effort"),
            **(body.chat_template_kwargs or {}),
        },
        caller=caller_of(request, service.settings, body.user or body.safety_identifier, body.priority),
    )


def _schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema of the reply, if it must be JSON."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    param = "response_format.json_schema"
    if wanted.json_schema is None:
        raise ApiError(400, f"{param} is missing", param=param)
    schema = ANY_OBJECT if wanted.json_schema.schema_ is None else wanted.json_schema.schema_
    check_schema(schema, f"{param}.schema")
    return schema


def _message(message: Message, param: str) -> dict[str, Any]:
    """A message as chat templates expect it."""
    role = "system" if message.role == "developer" else message.role
    if message.content is None and not (role == "assistant" and (message.tool_calls or message.reasoning_content)):
        raise ApiError(400, f"{param}.content is missing", param=f"{param}.content")
    if role == "tool" and message.tool_call_id is None:
        raise ApiError(400, f"{param}.tool_call_id is missing", param=f"{param}.tool_call_id")
    value: dict[str, Any] = {"role": role, "content": joined(message.content)}
    value |= message.model_dump(exclude_none=True, include={"name", "tool_call_id", "reasoning_content"})
    if message.tool_calls:
        value["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
    return value


def _head(reply_id: str, body: ChatBody, kind: str) -> dict[str, Any]:
    return {"id": reply_id, "object": kind, "created": now(), "model": body.model, "system_fingerprint": None}


def _usage(chat: Chat) -> dict[str, Any]:
    prompt, cached, new = token_counts(chat.receipts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in chat.choices)},
        "receipts": receipts_of(chat.receipts),
    }


def _finish_reason(choice: Choice) -> str | None:
    return "tool_calls" if choice.gathered.calls and choice.finish_reason == "stop" else choice.finish_reason


def _choice(index: int, choice: Choice, body: ChatBody, tokenizer: Tokenizer) -> dict[str, Any]:
    """A whole reply."""
    got = choice.gathered
    message: dict[str, Any] = {
        "role": "assistant",
        "content": got.content or (None if got.calls else ""),
        "refusal": None,
    }
    if got.reasoning:
        message["reasoning_content"] = got.reasoning
    if got.calls:
        message["tool_calls"] = [
            {"id": new_id("call_"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in got.calls
        ]
    logprobs = logprobs_of(choice.logprobs, tokenizer) if body.logprobs else None
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _finish_reason(choice)}


def logprobs_of(values: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """Log probabilities of tokens, as chat completions write them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token], skip_special=False)
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode()),
        }

    return {
        "content": [
            {**entry(value.token, value.logprob), "top_logprobs": [entry(*pair) for pair in value.top]}
            for value in values
        ],
        "refusal": None,
    }


async def _stream(chat: Chat, reply_id: str, body: ChatBody, tokenizer: Tokenizer) -> AsyncGenerator[str]:
    """The events of a streamed answer."""
    head = _head(reply_id, body, "chat.completion.chunk")
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    if with_usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event(head | {"choices": [choice]})

    try:
        for index in range(len(chat.choices)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, events, delta in chat.events():
            logprobs = logprobs_of([delta.logprobs], tokenizer) if body.logprobs and delta.logprobs else None
            changes = [change for e in events if (change := _change(e)) is not None]
            for change in changes or ([{"content": ""}] if logprobs else []):
                yield chunk(index, change, logprobs)
                logprobs = None
            if delta.finish_reason is not None:
                yield chunk(index, {}, None, _finish_reason(chat.choices[index]))
        if with_usage:
            yield event(head | {"choices": [], "usage": _usage(chat)})
        yield DONE
    except Exception as error:  # the status has been sent: all that is left is to say it here
        yield event(error_body(as_api_error(error), PATH))


def _change(change: Event) -> dict[str, Any] | None:
    """The delta that an event is, or None."""
    match change:
        case Reasoning(text):
            return {"reasoning_content": text}
        case Content(text):
            return {"content": text}
        case CallStart(index, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": new_id("call_"), "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return None
