"""Replies as text: joins the engine, which knows tokens only, with the tokenizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from moestream.engine.engine import Engine, Ids, TokenEvent
from moestream.engine.receipt import FinishReason, Receipt
from moestream.engine.sampling import Constraint, SamplingParams, TokenLogprobs
from moestream.engine.sequence import Caller
from moestream.engine.sequence import Sequence as EngineSequence
from moestream.errors import MoestreamError, RequestError
from moestream.text.tokenizer import TextStream, Tokenizer
from moestream.text.tools import ParsedReply
from moestream.text.turns import Turns


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a reply. The last one carries the finish reason and the receipt."""

    text: str
    """Whole characters; may be empty while a character or a possible stop string is incomplete."""
    token_ids: tuple[int, ...]
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    receipt: Receipt | None = None
    reply: ParsedReply | None = None
    """Of a chat, in the last one: reasoning, content and tool calls."""
    stop: str | None = None
    """In the last one: the stop string that ended the reply."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished reply."""

    text: str
    """Without special tokens and without the stop string that ended it."""
    token_ids: tuple[int, ...]
    """Every token chosen; an end token, if one ended the reply, is the last."""
    finish_reason: FinishReason
    receipt: Receipt
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: MoestreamError | None = None
    """Set when the finish reason is ``"error"``."""
    reply: ParsedReply | None = None
    """Of a chat: reasoning, content and tool calls."""


@dataclass(slots=True, eq=False)
class Reply:
    """A request on its way, and what is not fetched of it yet."""

    sequence: EngineSequence
    text: TextStream | None
    asked: int
    """How often everything had been cancelled when it was asked for."""
    pending: deque[Delta] = field(default_factory=deque)
    ended: bool = False
    """The last delta has been queued."""


class Replies:
    """Runs requests and turns their tokens into text. Thread-safe.

    Of those who wait for a token one runs a step for all, so that concurrent requests share the experts they read.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, receipt: Callable[[EngineSequence], Receipt]
    ) -> None:
        """Serve an engine.

        Args:
            engine: Used under ``lock`` only.
            tokenizer: None: every text is empty.
            receipt: Closes the account of a finished sequence.
        """
        self.lock = Turns()
        self._engine = engine
        self._tokenizer = tokenizer
        self._receipt = receipt
        self._open: dict[int, Reply] = {}
        self._closed = False
        self._cancelled = 0

    def close(self) -> None:
        """Cancel everything; nothing can be asked afterwards."""
        with self.lock:
            self._closed = True
            self._abort_all()
            self._open.clear()

    def cancel(self) -> None:
        """End every request asked for so far before its next step, also one that has not begun; what it has stays.

        Safe in a signal handler.
        """
        self._cancelled += 1  # the lock may be held by the very thread the signal interrupted

    def submit(
        self, ids: Ids, params: SamplingParams, constraint: Constraint | None = None, caller: Caller | None = None
    ) -> Reply:
        """Queue a request for a caller that calls ``step`` itself and takes deltas from ``pending``, then ``release``.

        Raises:
            RequestError: the prompt is wrong, or the model has been closed.
        """
        return self._submit(ids, params, self._cancelled, constraint, caller)

    def release(self, reply: Reply) -> None:
        """Forget a reply; cancels it when it still runs."""
        with self.lock:
            self._engine.abort(reply.sequence)
            self._open.pop(reply.sequence.id, None)

    def step(self) -> bool:
        """Run one step for all requests; False when there was nothing to do."""
        with self.lock:
            for reply in list(self._open.values()):
                if reply.asked < self._cancelled:
                    self._engine.abort(reply.sequence)
            busy = not self._engine.idle
            for event in self._engine.step():
                self._deliver(event)
            self._end_finished()
            return busy

    def run(self, prompts: Sequence[Ids], params: SamplingParams) -> list[Completion]:
        """Complete prompts as one batch; a request that fails has ``error`` set.

        Raises:
            RequestError: a prompt is wrong; nothing was run.
        """
        for ids in prompts:
            self._engine.check(ids)
        replies: list[Reply] = []
        asked = self._cancelled
        try:
            with self._interruptible():
                replies += [self._submit(ids, params, asked) for ids in prompts]
                return [self._finished(reply) for reply in replies]
        finally:
            for reply in replies:
                self.release(reply)

    def stream(self, ids: Ids, params: SamplingParams) -> Iterator[Delta]:
        """Complete a prompt token by token; closing the iterator cancels the request.

        Raises:
            RequestError: the prompt is wrong (at once).
            MoestreamError: the request failed (while iterating).
        """
        self._engine.check(ids)
        return self._stream(ids, params, self._cancelled)

    def _stream(self, ids: Ids, params: SamplingParams, asked: int) -> Iterator[Delta]:
        with self._interruptible():
            reply = self._submit(ids, params, asked)
            try:
                while True:
                    delta = self._next(reply)
                    if delta.finish_reason == "error" and reply.sequence.error is not None:
                        raise reply.sequence.error
                    yield delta
                    if delta.finish_reason is not None:
                        return
            finally:
                self.release(reply)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """On Ctrl-C cancel every request: wherever it struck, some of them may have lost a token or a place."""
        try:
            yield
        except (Exception, GeneratorExit):
            raise
        except BaseException:
            self.lock.forget()
            with self.lock:
                self._abort_all()
                self._end_finished()
            raise

    def _finished(self, reply: Reply) -> Completion:
        text: list[str] = []
        while True:
            delta = self._next(reply)
            text.append(delta.text)
            if delta.finish_reason is not None and delta.receipt is not None:
                sequence = reply.sequence
                return Completion(
                    text="".join(text),
                    token_ids=tuple(sequence.tokens),
                    finish_reason=delta.finish_reason,
                    receipt=delta.receipt,
                    logprobs=None if sequence.params.logprobs is None else tuple(sequence.logprobs),
                    error=sequence.error,
                )

    def _submit(
        self,
        ids: Ids,
        params: SamplingParams,
        asked: int,
        constraint: Constraint | None = None,
        caller: Caller | None = None,
    ) -> Reply:
        with self.lock:
            if self._closed:
                raise RequestError("the model has been closed")
            sequence = self._engine.add(ids, params, constraint, caller)
            reply = Reply(sequence, TextStream(self._tokenizer, params.stop) if self._tokenizer else None, asked)
            self._open[sequence.id] = reply
            return reply

    def _next(self, reply: Reply) -> Delta:
        """The next delta of a reply; runs steps, for all requests, until there is one."""
        while True:
            with self.lock.step(unless=lambda: reply.pending) as due:
                if due:
                    self._step(reply)
            if reply.pending:
                return reply.pending.popleft()

    def _step(self, waiting: Reply) -> None:
        if waiting.sequence.finished:
            raise RequestError("the request was cancelled: the model has been closed")
        self.step()

    def _abort_all(self) -> None:
        self._engine.abort_all()
        for reply in list(self._open.values()):
            self._engine.abort(reply.sequence)

    def _end_finished(self) -> None:
        """Queue the last delta of replies that ended without an event."""
        for reply in list(self._open.values()):
            if reply.sequence.finished and not reply.ended:
                self._end(reply, "", ())

    def _deliver(self, event: TokenEvent) -> None:
        """Turn what the engine did for one sequence into a delta of its reply."""
        sequence = event.sequence
        reply = self._open.get(sequence.id)
        if reply is None:  # its stream was collected as garbage during this step
            return
        if event.token is None:
            self._end(reply, "", ())
            return
        text = ""
        if reply.text is not None and not event.ends:
            text = reply.text.push(event.token)
            if reply.text.stopped is not None:
                self._engine.abort(sequence, "stop")
        if sequence.finished:
            self._end(reply, text, (event.token,), event.logprobs)
        else:
            reply.pending.append(Delta(text, (event.token,), event.logprobs))

    def _end(self, reply: Reply, text: str, ids: tuple[int, ...], logprobs: TokenLogprobs | None = None) -> None:
        """Queue the last delta of a reply."""
        if reply.text is not None:
            text += reply.text.finish()
            if reply.text.stopped is not None:
                self._engine.abort(reply.sequence, "stop")
        receipt = self._receipt(reply.sequence)
        stop = reply.text.stopped if reply.text is not None else None
        reply.pending.append(Delta(text, ids, logprobs, reply.sequence.finish_reason, receipt, stop=stop))
        reply.ended = True
