"""The engine: schedule, run, postprocess. Token ids in, token ids out.

Shape letters: N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moestream.engine.prefix import PrefixCache
from moestream.engine.receipt import FinishReason, IoCounters, Usage
from moestream.engine.sampling import Constraint, Sampler, SamplingParams, TokenLogprobs, token_logprobs
from moestream.engine.scheduler import Scheduler
from moestream.engine.sequence import Sequence
from moestream.errors import MoestreamError, RequestError
from moestream.models.batch import Batch
from moestream.models.states import SequenceStates
from moestream.ops.base import F32, I64

Ids = abc.Sequence[int] | npt.NDArray[np.integer]
PromptProgress = Callable[[int, int], None]
"""Called with (done, total), both in layers x prompt tokens, after each layer of a step that reads prompts."""


class EngineModel(Protocol):
    """What the engine needs of a model."""

    def new_states(self, limit: int | None = None) -> SequenceStates:
        """States of a sequence of up to ``limit`` tokens."""

    def forward(self, batch: Batch) -> F32:
        """Logits [N, V]; advances the states and fills ``batch.failures``."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What a step did for one sequence: a new token, the end, or both."""

    sequence: Sequence
    token: int | None
    logprobs: TokenLogprobs | None = None
    ends: bool = False
    """The token only ends the reply and is no part of its text."""


class Engine:
    """Runs requests on a model. Not thread-safe: one call at a time.

    A sequence that fails (an unreadable expert, NaN logits) ends alone with its error. When a step fails as a whole,
    every sequence in it ends, because their states stand somewhere between two tokens; the waiting ones go on.

    Attributes:
        on_progress: Told how far the prompts of a step are, those of one step together; all chunks of a prompt count
            into its total.
        on_step: Told the sequences of a step, each with the number of its next tokens, before it runs; for recording.
    """

    def __init__(
        self,
        model: EngineModel,
        *,
        vocab_size: int,
        context: int,
        eos_ids: abc.Set[int] = frozenset(),
        max_batch: int = 8,
        prefill_chunk: int = 512,
        prefixes: PrefixCache | None = None,
        counters: Callable[[], IoCounters] = IoCounters,
        recover: Callable[[], None] = lambda: None,
    ) -> None:
        """Make an engine.

        Args:
            model: What computes logits.
            vocab_size: V; ids outside it are refused.
            context: Tokens of prompt and reply that a sequence may have.
            eos_ids: Tokens that end a reply.
            max_batch: Sequences that hold states at a time.
            prefill_chunk: Prompt tokens of a step.
            prefixes: Spares what prompts begin with alike.
            counters: The expert store's counters, read before and after each step.
            recover: Called before the next step after an exception left the model's expert source half way.
        """
        self.context = context
        self.on_progress: PromptProgress | None = None
        self.on_step: Callable[[list[tuple[Sequence, int]]], None] | None = None
        self._model = model
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._prefill_chunk = prefill_chunk
        self._scheduler = Scheduler(max_batch, prefill_chunk)
        self._prefixes = prefixes
        self._counters = counters
        self._recover = recover
        self._half_way = False
        self._ids = itertools.count()

    @property
    def idle(self) -> bool:
        """Whether every sequence has ended."""
        return not self._scheduler.running and not self._scheduler.waiting

    def check(self, prompt: Ids, reply: int = 1) -> I64:
        """Token ids as an array, if the engine can take them with room for ``reply`` more.

        Raises:
            RequestError: the prompt is empty, too long, or holds ids outside the vocabulary.
        """
        try:
            ids = np.asarray(prompt)
        except ValueError:  # ragged
            ids = np.empty((1, 1))
        if not ids.size:
            raise RequestError("the prompt is empty")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError("a prompt of token ids must be a flat sequence of whole numbers")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            bad = int(ids[(ids < 0) | (ids >= self._vocab_size)][0])
            raise RequestError(f"token id {bad} is outside the vocabulary of {self._vocab_size}")
        if ids.size + reply > self.context:
            raise RequestError(
                f"the prompt has {ids.size} tokens, but the context of {self.context} tokens holds "
                f"{self.context - reply}{' and a reply' if reply else ''}. "
                "Load the model with a larger context if memory allows"
            )
        return ids.astype(np.int64)

    def add(self, prompt: Ids, params: SamplingParams, constraint: Constraint | None = None) -> Sequence:
        """Queue a request, whose reply is what ``constraint`` allows.

        Raises:
            RequestError: see ``check``.
        """
        tokens = tuple(self.check(prompt).tolist())
        sampler = Sampler(params, tokens, constraint)
        sequence = Sequence(next(self._ids), tokens, params, sampler, Usage(time.perf_counter()))
        self._scheduler.add(sequence)
        return sequence

    def logits(self, ids: Ids) -> F32:
        """Logits [T, V] after each of T tokens of a sequence of its own, in sweeps of the usual size.

        Raises:
            RequestError: see ``check``.
            ReadError: an expert could not be read.
        """
        tokens = self.check(ids, reply=0).astype(np.int32)
        states = self._model.new_states(len(tokens))
        result = np.empty((len(tokens), self._vocab_size), np.float32)
        for start in range(0, len(tokens), self._prefill_chunk):
            chunk = slice(start, start + self._prefill_chunk)
            batch = Batch.of([(tokens[chunk], states)], all_logits=True)
            result[chunk] = self._forward(batch)
            if batch.failures:
                raise batch.failures[0][1]
        return result

    def abort(self, sequence: Sequence, reason: FinishReason = "cancelled") -> None:
        """End a sequence now; ``"stop"`` when its text reached a stop string. No effect after its end.

        The one exception: a stop string that the last allowed token completed is what ended the reply.
        """
        if not sequence.finished:
            self._finish(sequence, reason)
        elif reason == "stop" and sequence.finish_reason == "length":
            sequence.finish_reason = reason

    def abort_all(self) -> None:
        """End every sequence now."""
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            self.abort(sequence)

    def close(self) -> None:
        """Cancel what runs; the prefix cache writes down what it may keep."""
        self.abort_all()
        if self._prefixes is not None:
            self._prefixes.close()

    def step(self) -> list[TokenEvent]:
        """Run one step over all that is due.

        Returns:
            One event for each sequence that got a token or ended; empty when the engine is idle or a step only read
            part of a prompt.

        Raises:
            BaseException: KeyboardInterrupt and the like, after cancelling the sequences of the step.
        """
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        try:
            chunks = self._started(chunks)
            if self.on_step is not None:
                self.on_step(chunks)
            batch, wanted = self._batch(chunks)
            before = self._counters()
            logits = self._forward(batch)
            self._account(chunks, self._counters() - before)
            return self._postprocess(chunks, batch, wanted, logits)
        except Exception as error:
            return [self._fail(sequence, error) for sequence, _ in chunks if not sequence.finished]
        except BaseException:
            for sequence, _ in chunks:
                self.abort(sequence)
            raise

    def _started(self, chunks: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """The same chunks after new sequences got their states, without what the prefix cache brought."""
        for sequence, _ in chunks:
            if sequence.states is None:
                limit = sequence.params.max_tokens
                room = self.context if limit is None else min(self.context, len(sequence.prompt) + limit)
                sequence.usage.started = time.perf_counter()
                sequence.states = self._model.new_states(room)
                if self._prefixes is not None and sequence.params.prompt_logprobs is None:
                    sequence.cached = sequence.computed = self._prefixes.start(sequence.prompt, sequence.states)
        return [(s, count if s.decoding else min(count, len(s.prompt) - s.computed)) for s, count in chunks]

    def _forward(self, batch: Batch) -> F32:
        if self._half_way:
            self._recover()
        self._half_way = True  # stays so when forward raises, and when a second Ctrl-C ends the recovery
        logits = self._model.forward(batch)
        self._half_way = False
        return logits

    def _batch(self, chunks: list[tuple[Sequence, int]]) -> tuple[Batch, list[tuple[Sequence, int]]]:
        """The batch of a step, and the sequences that use its logits, in order, with the number of their rows."""
        parts, wanted, row = [], [], 0
        rows: list[int] = []
        for sequence, count in chunks:
            assert sequence.states is not None
            parts.append((sequence.upcoming(count), sequence.states))
            own = range(row, row + count)
            if sequence.params.prompt_logprobs is None or sequence.decoding:
                ready = sequence.computed + count >= len(sequence.prompt)
                own = own[-1:] if ready else own[:0]
            rows += own
            wanted.append((sequence, len(own)))
            row += count
        batch = Batch.of(parts)
        batch.logits_rows = np.array(rows, np.int32)
        if self.on_progress is not None:
            batch.on_layer = _prompt_progress(chunks, self.on_progress)
        return batch, wanted

    def _account(self, chunks: list[tuple[Sequence, int]], io: IoCounters) -> None:
        total = sum(count for _, count in chunks)
        for sequence, count in chunks:
            sequence.usage.io += io.scaled(count / total)

    def _postprocess(
        self, chunks: list[tuple[Sequence, int]], batch: Batch, wanted: list[tuple[Sequence, int]], logits: F32
    ) -> list[TokenEvent]:
        failed: dict[int, MoestreamError] = {}
        for row, error in batch.failures:
            index = next(i for i, s in enumerate(batch.segments) if s.start <= row < s.start + s.length)
            failed.setdefault(index, error)
        events = []
        for index, (sequence, count) in enumerate(chunks):
            sequence.computed += count
            if index in failed:
                events.append(self._fail(sequence, failed[index]))
        start = 0
        for sequence, count in wanted:
            own = logits[start : start + count]
            start += count
            if sequence.finished or not count:
                continue
            _score_prompt(sequence, own)
            if sequence.decoding:
                if self._prefixes is not None and not sequence.tokens and sequence.states is not None:
                    self._prefixes.keep(sequence.prompt, sequence.states)
                events.append(self._sample(sequence, own[-1]))
        return events

    def _sample(self, sequence: Sequence, logits: F32) -> TokenEvent:
        constraint = sequence.sampler.constraint
        try:
            sampled = sequence.sampler.sample(logits, sequence.tokens)
            complete = constraint is not None and constraint.complete
        except Exception as error:  # its own affair: NaN logits, or a constraint that failed
            return self._fail(sequence, error)
        usage, params = sequence.usage, sequence.params
        usage.last = time.perf_counter()
        usage.first = usage.first or usage.last
        sequence.tokens.append(sampled.token)
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        ended = sampled.token in params.stop_token_ids or (sampled.token in self._eos_ids and not params.ignore_eos)
        length = len(sequence.tokens)
        if ended or complete:
            self._finish(sequence, "stop")
        elif length == params.max_tokens or len(sequence.prompt) + length >= self.context:
            self._finish(sequence, "length")
        return TokenEvent(sequence, sampled.token, sampled.logprobs, ends=ended)

    def _fail(self, sequence: Sequence, error: Exception) -> TokenEvent:
        if not isinstance(error, MoestreamError):
            cause = error
            error = RequestError(f"the step failed: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
        sequence.error = error
        self._finish(sequence, "error")
        return TokenEvent(sequence, None)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        if self._half_way or reason == "error":
            sequence.states = None  # they stand somewhere between two tokens
        if self._prefixes is not None and sequence.states is not None and sequence.tokens:
            self._prefixes.keep_end((*sequence.prompt, *sequence.tokens), sequence.states)
        sequence.states = None  # its memory is free for the next one
        self._scheduler.remove(sequence)


def _score_prompt(sequence: Sequence, logits: F32) -> None:
    """Log probabilities of the prompt's tokens, from the logits [N, V] after those just before them."""
    top = sequence.params.prompt_logprobs
    if top is not None:
        first = sequence.computed - len(logits) + 1
        for row, token in zip(logits, sequence.prompt[first : first + len(logits)], strict=False):
            sequence.prompt_logprobs.append(token_logprobs(row, token, top))


def _prompt_progress(chunks: list[tuple[Sequence, int]], report: PromptProgress) -> Callable[[int, int], None] | None:
    """What a layer's end means for the prompts of a step; None for a step without any."""
    reading = [(sequence, count) for sequence, count in chunks if not sequence.decoding]
    before = sum(sequence.computed for sequence, _ in reading)
    now = sum(count for _, count in reading)
    total = sum(len(sequence.prompt) for sequence, _ in reading)
    return (lambda done, layers: report(layers * before + done * now, layers * total)) if reading else None
