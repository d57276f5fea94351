"""Answer a conversation, whichever API asked: one flow from messages to events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moestream.engine.receipt import FinishReason, Receipt
from moestream.engine.sampling import SamplingParams, TokenLogprobs
from moestream.engine.sequence import Caller
from moestream.server.constraints import Shape
from moestream.server.errors import ApiError
from moestream.server.schemas import chosen_tools
from moestream.server.service import Generation, Service
from moestream.text.replies import Delta
from moestream.text.reply_reader import Event, Gathered, ReplyReader
from moestream.text.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which functions a reply may or must call."""

    tools: Sequence[Mapping[str, Any]] = ()
    """As chat templates expect them."""
    choice: str = "auto"
    """``auto``, ``none``, ``required``, or the name of the one that must be called."""
    param: str = "tool_choice"
    """For errors."""
    strict: bool = False
    """Calls must be valid under their schemas."""
    parallel: bool = True

    @property
    def shown(self) -> Sequence[Mapping[str, Any]]:
        """What the model is told of."""
        return () if self.choice == "none" else self.tools

    def shape(self, form: ToolFormat | None, schema: Mapping[str, Any] | None) -> Shape:
        """What the reply must consist of, with ``schema`` for replies that are no calls.

        Raises:
            ApiError: the function that must be called does not exist.
        """
        if self.choice == "required":
            if not self.tools:
                raise ApiError(400, f"{self.param}: a call is required, but there are no tools", param=self.param)
            return Shape(form=form, tools=self.tools, must_call=True, parallel=self.parallel)
        if self.choice not in ("auto", "none"):
            one = chosen_tools(self.tools, self.choice, self.param)
            return Shape(form=form, tools=one, must_call=True, parallel=False)
        if self.shown and (self.strict or schema is not None or not self.parallel):
            return Shape(schema, form, self.shown, parallel=self.parallel)
        return Shape(schema)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to be answered ``len(params)`` times."""

    messages: Sequence[Mapping[str, Any]]
    params: Sequence[SamplingParams]
    use: ToolUse = field(default_factory=ToolUse)
    schema: Mapping[str, Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the chat template."""
    thought_budget: int | None = None
    """Tokens the model may think."""
    caller: Caller = field(default_factory=Caller)


@dataclass(slots=True)
class Choice:
    """One reply as it is read."""

    reader: ReplyReader
    gathered: Gathered = field(default_factory=Gathered)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reasoning_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop: str | None = None

    def take(self, delta: Delta) -> list[Event]:
        """Read on."""
        self.reasoning_tokens += len(delta.token_ids) if self.reader.thinking else 0
        events = self.reader.push(delta.text)
        if delta.finish_reason is not None:
            events += self.reader.finish()
            self.finish_reason, self.stop = delta.finish_reason, delta.stop
        if delta.logprobs is not None:
            self.logprobs.append(delta.logprobs)
        self.gathered.add(events)
        return events


@dataclass(slots=True)
class Chat:
    """Replies to one conversation, on their way."""

    generation: Generation
    choices: list[Choice]

    @property
    def receipts(self) -> Mapping[int, Receipt]:
        """Of the replies that have ended."""
        return self.generation.receipts

    async def events(self) -> AsyncIterator[tuple[int, list[Event], Delta]]:
        """(index of the reply, what its new text means, the delta itself) as they come.

        Raises:
            ApiError: the server is shutting down, or the engine failed.
        """
        async for index, delta in self.generation.deltas():
            yield index, self.choices[index].take(delta), delta

    async def finish(self) -> Chat:
        """Wait for the end of all replies."""
        async for _ in self.events():
            pass
        return self

    def close(self) -> None:
        """Cancel what still runs."""
        self.generation.close()


async def begin(service: Service, request: ChatRequest) -> Chat:
    """Start to answer; everything that can be refused is refused here.

    Raises:
        ApiError: the request cannot be served, or not now.
        MoestreamError: the messages or a parameter are wrong.
    """
    model = service.loaded
    use = request.use
    service.check_room(len(request.params))
    prompt = await service.chat_prompt(request.messages, use.shown, request.variables)
    shape = use.shape(model.form, request.schema)
    constraint = await service.constraint(shape, prompt, request.thought_budget)
    form = model.form if use.shown else None
    choices = [Choice(ReplyReader(form, use.shown, prompt.in_thought)) for _ in request.params]
    generation = service.open([prompt.ids] * len(request.params), request.params, request.caller, constraint)
    return Chat(generation, choices)


def spread(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Parameters of ``count`` replies to one prompt: each draws for itself, and all are repeatable with a seed."""
    if params.seed is None:
        return [params] * count
    return [replace(params, seed=params.seed + index) for index in range(count)]
