"""OpenAI's ``/v1/completions``: plain text or token ids, with the log probabilities that evaluations need."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from moestream.engine.sampling import TokenLogprobs
from moestream.server.chat import spread
from moestream.server.errors import ApiError, as_api_error, error_body, json_response
from moestream.server.openai_chat import DONE, PING, StreamOptions
from moestream.server.schemas import (
    Body,
    Int,
    Label,
    LogitBias,
    Priority,
    StopText,
    StopTexts,
    biases,
    caller_of,
    new_id,
    now,
    receipts_of,
    token_counts,
)
from moestream.server.service import Generation, Service
from moestream.server.sse import EventStream, event, unless_gone
from moestream.text.replies import Delta
from moestream.text.tokenizer import Tokenizer

PATH = "/v1/completions"
MAX_PROMPTS = 128
TokenId = Annotated[Int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20, fail_fast=True)]


class CompletionBody(Body):
    """The body of ``/v1/completions``."""

    model: str
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    n: Annotated[Int, Field(ge=1, le=128)] | None = None
    best_of: Annotated[Int, Field(ge=1, le=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Int | None = None
    stop: StopText | StopTexts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: None = None
    logit_bias: LogitBias | None = None
    priority: Priority | None = None
    user: Label = None


@dataclass(slots=True)
class _Choice:
    """One completion as it comes."""

    prompt: list[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: str | None = None

    def take(self, delta: Delta) -> None:
        """Read on."""
        self.text += delta.text
        self.tokens += delta.token_ids
        self.reason = delta.finish_reason
        if delta.logprobs is not None:
            self.logprobs.append(delta.logprobs)


async def completions(service: Service, body: CompletionBody, request: Request) -> Response:
    """Continue one or several prompts."""
    service.check_model(body.model)
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, which needs echo to be true", param="max_tokens")
    if body.echo and body.stream and body.logprobs is not None:
        raise ApiError(400, "echo with logprobs cannot be streamed", param="stream")
    prompts = await _prompts(service, body)
    count = body.n or 1
    if count > service.settings.max_choices:
        raise ApiError(400, f"n is {count}, at most {service.settings.max_choices} are allowed", param="n")
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
        max_tokens=16 if body.max_tokens is None else max(1, body.max_tokens),
        stop=(body.stop,) if isinstance(body.stop, str) else body.stop,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    choices = [_Choice(ids) for ids in prompts for _ in range(count)]
    reply_id, tokenizer = new_id("cmpl-"), service.loaded.tokenizer
    caller = caller_of(request, service.settings, body.user, body.priority)
    generation = service.open([c.prompt for c in choices], spread(params, count) * len(prompts), caller)
    request.scope["moestream"].watch(generation, reply_id)
    head = {"id": reply_id, "object": "text_completion", "created": now(), "model": body.model}
    if body.stream:
        events = _stream(generation, choices, head, body, tokenizer, len(prompts))
        return EventStream(events, PING, service.settings.ping_seconds, generation.close)
    try:
        await unless_gone(request.receive, _finish(generation, choices))
    finally:
        generation.close()
    done = [
        _choice(index, choice, body, tokenizer, generation.prompt_logprobs(index))
        for index, choice in enumerate(choices)
    ]
    return json_response(head | {"choices": done, "usage": _usage(generation, len(prompts), body)})


async def _prompts(service: Service, body: CompletionBody) -> list[list[int]]:
    """Token ids of every prompt, checked."""
    given: Sequence[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    prompts = [await service.encode(p) if isinstance(p, str) else list(p) for p in given]
    for ids in prompts:
        service.check_ids(ids)
    return prompts


async def _finish(generation: Generation, choices: Sequence[_Choice]) -> None:
    async for index, delta in generation.deltas():
        choices[index].take(delta)


def _usage(generation: Generation, prompts: int, body: CompletionBody) -> dict[str, Any]:
    prompt, cached, new = token_counts(generation.receipts, prompts)
    new = 0 if body.max_tokens == 0 else new
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
        "receipts": receipts_of(generation.receipts),
    }


def _choice(
    index: int, choice: _Choice, body: CompletionBody, tokenizer: Tokenizer, prompt: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    """A whole completion, after its prompt where ``echo`` asks for it."""
    if body.max_tokens == 0:  # the engine chooses one token at least; it comes with the prompt's last logits
        choice = replace(choice, text="", tokens=[], logprobs=[], reason="length")
    text, logprobs = choice.text, None
    if body.logprobs is not None:
        logprobs = _logprobs(choice.logprobs, tokenizer, 0)
    if body.echo:
        before = tokenizer.decode(choice.prompt, skip_special=False)
        text = before + text
        if logprobs is not None:
            first = tokenizer.decode(choice.prompt[:1], skip_special=False)
            asked = _logprobs(prompt, tokenizer, len(first))
            logprobs = {
                "tokens": [first, *asked["tokens"], *logprobs["tokens"]],
                "token_logprobs": [None, *asked["token_logprobs"], *logprobs["token_logprobs"]],
                "top_logprobs": [None, *asked["top_logprobs"], *logprobs["top_logprobs"]],
                "text_offset": [0, *asked["text_offset"], *(len(before) + at for at in logprobs["text_offset"])],
            }
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.reason}


def _logprobs(values: Sequence[TokenLogprobs], tokenizer: Tokenizer, start: int) -> dict[str, list[Any]]:
    """Log probabilities as completions write them; ``start`` is where the first token's text begins."""

    def text(token: int) -> str:
        return tokenizer.decode([token], skip_special=False)

    tokens = [text(value.token) for value in values]
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [value.logprob for value in values],
        "top_logprobs": [{text(token): logprob for token, logprob in value.top} for value in values],
        "text_offset": offsets,
    }


async def _stream(
    generation: Generation,
    choices: Sequence[_Choice],
    head: dict[str, Any],
    body: CompletionBody,
    tokenizer: Tokenizer,
    prompts: int,
) -> AsyncGenerator[str]:
    """The events of a streamed answer."""
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    head = head | ({"usage": None} if with_usage else {})
    offsets = [0] * len(choices)

    def chunk(index: int, text: str, logprobs: Any = None, reason: str | None = None) -> str:
        return event(
            head | {"choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]}
        )

    try:
        if body.echo:
            for index, choice in enumerate(choices):
                yield chunk(index, tokenizer.decode(choice.prompt, skip_special=False))
        async for index, delta in generation.deltas():
            if body.max_tokens == 0:
                yield chunk(index, "", None, "length")
                continue
            logprobs = None
            if delta.logprobs is not None:
                logprobs = _logprobs([delta.logprobs], tokenizer, offsets[index])
                offsets[index] += len(logprobs["tokens"][0])
            if delta.text or logprobs or delta.finish_reason:
                yield chunk(index, delta.text, logprobs, delta.finish_reason)
        if with_usage:
            yield event(head | {"choices": [], "usage": _usage(generation, prompts, body)})
        yield DONE
    except Exception as error:  # the status has been sent: all that is left is to say it here
        yield event(error_body(as_api_error(error), PATH))
