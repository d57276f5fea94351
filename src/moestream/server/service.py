"""Between the APIs and the worker: prompts, parameters, places in the queue, and replies as they come."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moestream.engine.engine import Ids
from moestream.engine.receipt import Receipt
from moestream.engine.sampling import Constraint, SamplingParams, TokenLogprobs
from moestream.engine.sequence import Caller
from moestream.errors import CheckpointError, MoestreamError
from moestream.llm import LLM
from moestream.server.constraints import Grammars, Shape
from moestream.server.errors import ApiError
from moestream.server.metrics import Metrics
from moestream.server.settings import ServeSettings
from moestream.server.worker import Job, Worker
from moestream.text.chat_template import RESERVED
from moestream.text.replies import Delta
from moestream.text.reply_reader import END_THINK, THINK
from moestream.text.tokenizer import Tokenizer
from moestream.text.tool_formats import ToolFormat, format_of

MAX_RETRY_SECONDS = 120


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the model reads it."""

    ids: Ids
    in_thought: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is known of the model once it is loaded."""

    llm: LLM
    tokenizer: Tokenizer
    grammars: Grammars
    form: ToolFormat | None
    template: str
    longest_token: int
    """Characters; a text cannot have fewer tokens than its length divided by it."""

    @property
    def context(self) -> int:
        """Tokens of prompt and reply."""
        return self.llm.runtime.engine.context

    @classmethod
    def of(cls, llm: LLM) -> Loaded:
        """Look at a loaded model.

        Raises:
            CheckpointError: it has no tokenizer.
        """
        tokenizer = llm.tokenizer
        if tokenizer is None:
            raise CheckpointError(f"{llm.runtime.folder} has no tokenizer.json, which a server needs")
        template = llm.template.source if llm.template else ""
        grammars = Grammars(tokenizer, llm.runtime.config.vocab_size, THINK in template or END_THINK in template)
        return cls(llm, tokenizer, grammars, format_of(template), template, tokenizer.longest)


class Service:
    """One loaded model, served. Methods are called on the event loop."""

    def __init__(self, model: str, settings: ServeSettings, load: Callable[[], LLM]) -> None:
        """Make a service; ``start`` loads.

        Args:
            model: As the user named it.
            settings: Of the server.
            load: Loads the model, in the worker's thread.
        """
        self.settings = settings
        self.names = settings.names or (Path(model).name or model,)
        self.created = int(time.time())
        self.draining = False
        self._load_model = load
        self._loaded: Loaded | None = None
        self.worker = Worker(self._load, self._state_changed)
        self.metrics = Metrics(self.worker)
        self.changed = asyncio.Event()
        """Set when the worker is not loading any more."""
        self._places = 0
        self._seconds = 1.0  # what a request has taken lately, for Retry-After

    def _load(self) -> LLM:
        """Runs in the worker's thread."""
        llm = self._load_model()
        try:
            self._loaded = Loaded.of(llm)
        except BaseException:
            llm.close()
            raise
        return llm

    def _state_changed(self) -> None:
        self.changed.set()

    @property
    def loaded(self) -> Loaded:
        """The model.

        Raises:
            ApiError: it is not there (yet).
        """
        if self.draining or self.worker.state in ("closed", "failed"):
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=10)
        if self._loaded is None or self.worker.state == "loading":
            raise ApiError(503, "the model is being loaded", code="loading", retry_after=5)
        return self._loaded

    def check_model(self, name: str) -> None:
        """Refuse requests for another model.

        Raises:
            ApiError: 404.
        """
        if name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404, f"the model {name!r} does not exist here; this server has {known}", code="model_not_found"
            )

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text that fits the context.

        Raises:
            ApiError: it is too long.
            RequestError: it is not valid Unicode.
        """
        model = self.loaded
        least = len(text) // model.longest_token
        if least >= model.context:  # a text of megabytes is refused without tokenizing it
            raise too_long(f"at least {least}", model.context)
        return await asyncio.to_thread(model.tokenizer.encode, text, special=special)

    def check_ids(self, ids: Ids) -> None:
        """Refuse prompts that the engine would refuse.

        Raises:
            ApiError: the prompt is too long.
            RequestError: it is empty or holds ids outside the vocabulary.
        """
        model = self.loaded
        if len(ids) >= model.context:
            raise too_long(str(len(ids)), model.context)
        model.llm.runtime.engine.check(ids)

    async def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> ChatPrompt:
        """What the model reads of a conversation.

        Raises:
            ApiError: the model has no chat template, or the conversation does not fit the context.
            TemplateError: the template refuses the messages, or failed.
            RequestError: a message is malformed.
        """
        model = self.loaded
        if model.llm.template is None:
            raise ApiError(400, "the model has no chat template (it is a base model): use /v1/completions")
        if reserved := sorted(RESERVED & set(variables)):
            raise ApiError(400, f"chat_template_kwargs: {reserved[0]} is reserved", param="chat_template_kwargs")
        if tools and model.form is None:
            raise ApiError(400, "tools: how this model writes calls is not known", param="tools")
        text = await asyncio.to_thread(model.llm.template.render, messages, tools=tools or None, **variables)
        ids = await self.encode(text, special=False)
        self.check_ids(ids)
        return ChatPrompt(ids, text.rstrip().endswith(THINK))

    async def constraint(
        self, shape: Shape, prompt: ChatPrompt, thought_budget: int | None = None
    ) -> Callable[[], Constraint | None]:
        """Makes constraints of replies to a prompt; None where any text will do.

        Raises:
            ApiError: the schema cannot be enforced, or the model does not think.
        """
        grammars = self.loaded.grammars

        def make() -> Constraint | None:
            inner = None if shape.free else grammars.constraint(shape, prompt.in_thought)
            if thought_budget is None:
                return inner
            return grammars.thought_budget(inner, thought_budget, prompt.in_thought)

        first = [await asyncio.to_thread(make)]  # the first one prepares the vocabulary
        return lambda: first.pop() if first else make()

    def params(self, **given: Any) -> SamplingParams:
        """Sampling as the model recommends, with what the request says; None says nothing.

        Raises:
            RequestError: a value is out of range.
            ApiError: a biased token does not exist.
        """
        values = {name: value for name, value in given.items() if value is not None}
        params = replace(self.loaded.llm.default_params, **{"max_tokens": None, **values})
        vocab_size = self.loaded.llm.runtime.config.vocab_size
        if bad := [token for token, _ in params.logit_bias if token >= vocab_size]:
            reason = f"logit_bias: token id {bad[0]} is outside the vocabulary of {vocab_size}"
            raise ApiError(400, reason, param="logit_bias")
        most = self.settings.max_tokens
        if most is not None and (params.max_tokens is None or params.max_tokens > most):
            params = replace(params, max_tokens=most)
        return params

    def check_room(self, count: int) -> None:
        """Refuse what has no place in the queue, before anything is done for it.

        Raises:
            ApiError: 429, or 400 when ``count`` replies never have.
        """
        together = self.loaded.llm.runtime.plan.max_batch
        capacity = together + self.settings.queue
        if count > capacity:
            raise ApiError(400, f"{count} replies are asked for at once, at most {capacity} are possible")
        if self._places + count > capacity:
            wait = math.ceil(self._seconds * max(1, self._places) / together)
            raise ApiError(
                429,
                f"{self._places} requests run or wait, and at most {capacity} may; try again later",
                code="queue_full",
                retry_after=min(max(1, wait), MAX_RETRY_SECONDS),
            )

    def open(
        self,
        prompts: Sequence[Ids],
        params: Sequence[SamplingParams],
        caller: Caller,
        constraint: Callable[[], Constraint | None] = lambda: None,
    ) -> Generation:
        """Take places in the queue and run; the caller closes it.

        Raises:
            ApiError: 429, the queue is full.
        """
        self.check_room(len(prompts))
        wanted = [(ids, chosen, constraint()) for ids, chosen in zip(prompts, params, strict=True)]
        self._places += len(prompts)
        generation = Generation(self)
        if self.settings.request_timeout is not None:
            generation.expiry = asyncio.get_running_loop().call_later(self.settings.request_timeout, generation.expire)
        for ids, chosen, own in wanted:
            generation.add(ids, chosen, own, caller)
        return generation

    def give_place_back(self, started: float) -> None:
        """A sequence has ended that was asked for at ``started``, of ``time.monotonic``."""
        self._places -= 1
        self._seconds += 0.2 * (time.monotonic() - started - self._seconds)


@dataclass(slots=True, eq=False)
class Generation:
    """Replies on their way, of one API request."""

    service: Service
    jobs: list[Job] = field(default_factory=list)
    receipts: dict[int, Receipt] = field(default_factory=dict)
    expiry: asyncio.TimerHandle | None = None
    """Calls ``expire`` some day; it holds all of this until then or until it is cancelled."""
    _queue: asyncio.Queue[tuple[int, Delta | MoestreamError]] = field(default_factory=asyncio.Queue)
    _open: set[int] = field(default_factory=set)
    _started: float = field(default_factory=time.monotonic)

    def add(self, ids: Ids, params: SamplingParams, constraint: Constraint | None, caller: Caller) -> None:
        """Run one more sequence."""
        index = len(self.jobs)
        job = Job(ids, params, constraint, caller, lambda delta: self._take(index, delta))
        self.jobs.append(job)
        self._open.add(index)
        self.service.worker.submit(job)

    def _take(self, index: int, delta: Delta | MoestreamError) -> None:
        if index not in self._open:
            return  # cancelled in the meantime
        if isinstance(delta, MoestreamError):
            self.service.metrics.replies.labels("error").inc()
        if isinstance(delta, MoestreamError) or delta.finish_reason is not None:
            self._end(index)
        self._queue.put_nowait((index, delta))

    def _end(self, index: int) -> None:
        self._open.discard(index)
        self.service.give_place_back(self._started)
        if not self._open and self.expiry is not None:
            self.expiry.cancel()

    def close(self) -> None:
        """Cancel what still runs."""
        for index in list(self._open):
            self._end(index)
            self.service.worker.cancel(self.jobs[index])
            self.service.metrics.replies.labels("cancelled").inc()

    def expire(self) -> None:
        """The time a request may take is over."""
        if self._open:
            seconds = self.service.settings.request_timeout
            error = ApiError(504, f"the request took longer than {seconds:g} s (--request-timeout)", code="timeout")
            self._queue.put_nowait((min(self._open), error))
            self.close()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(index of the sequence, delta) as they come.

        Raises:
            ApiError: the server is shutting down, or the engine failed.
        """
        left = len(self.jobs)
        while left:
            index, delta = await self._queue.get()
            if isinstance(delta, ApiError):
                raise delta  # the request's own fault, found while it was served
            if isinstance(delta, MoestreamError):
                raise ApiError(500, str(delta), code="generation_failed")
            if delta.receipt is not None:
                left -= 1
                self.receipts[index] = delta.receipt
                self.service.metrics.finished(delta.receipt)
            if delta.finish_reason == "cancelled":
                raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=10)
            yield index, delta

    def prompt_logprobs(self, index: int) -> list[TokenLogprobs]:
        """Of a finished sequence that asked for them."""
        reply = self.jobs[index].reply
        return reply.sequence.prompt_logprobs if reply else []


def too_long(tokens: str, context: int) -> ApiError:
    """The prompt does not fit."""
    return ApiError(
        400,
        f"the prompt has {tokens} tokens, but the context of {context} tokens must hold it and a reply; "
        "start the server with a larger --context if memory allows",
        code="context_length_exceeded",
    )
