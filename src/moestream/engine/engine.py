"""The engine: schedule, run, postprocess. Token ids in, token ids out.

Shape letters: N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moestream.engine.pace import Pace
from moestream.engine.passes import EngineModel, Pass, PromptProgress, batch_of, prompt_progress, score_prompt
from moestream.engine.prefix import PrefixCache
from moestream.engine.receipt import FinishReason, IoCounters, Usage
from moestream.engine.sampling import Constraint, Sampler, SamplingParams, TokenLogprobs
from moestream.engine.scheduler import Scheduler
from moestream.engine.sequence import Caller, Sequence
from moestream.engine.state_budget import StateBudget
from moestream.errors import MoestreamError, RequestError
from moestream.models.batch import Batch
from moestream.ops.base import F32, I64

Ids = abc.Sequence[int] | npt.NDArray[np.integer]


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
        running: Held while the model computes or lets go of what it streamed.
        on_progress: Told how far the prompts of a step are, those of one step together; all chunks of a prompt count
            into its total.
        preemptions: How often a sequence had to give its states up for others and read its tokens again.
        on_step: Told the sequences of a step, each with the number of its next tokens, before it runs; for recording.
        on_pass: Told each pass before it runs, and before it goes on after a rest; for onlookers.
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
        states: StateBudget | None = None,
        pace: Pace | None = None,
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
            states: Bytes for the states of all sequences; None: no bound.
            pace: How long a prompt may keep replies waiting; None: until its chunk has been read.
            counters: The expert store's counters, read before and after each step.
            recover: Called before the next step after an exception left the model's expert source half way.
        """
        self.context = context
        self.running = threading.RLock()
        self.on_progress: PromptProgress | None = None
        self.preemptions = 0
        self.on_step: Callable[[list[tuple[Sequence, int]]], None] | None = None
        self.on_pass: Callable[[Pass], None] | None = None
        self._model = model
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._prefill_chunk = prefill_chunk
        self._states = states or StateBudget()
        self._scheduler = Scheduler(max_batch, self._states)
        self._pace = pace or Pace(None)
        self._resting: Pass | None = None
        self._decode_next = False  # replies under way have waited for a prompt
        self._prefixes = prefixes
        self._counters = counters
        self._recover = recover
        self._half_way = False
        self._ids = itertools.count()

    @property
    def states_reserved(self) -> int:
        """Bytes that the running sequences have reserved for their states."""
        return self._states.reserved

    @property
    def prefixes_held(self) -> int:
        """Bytes of what prompts begin with."""
        return self._prefixes.nbytes if self._prefixes is not None else 0

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

    def add(
        self, prompt: Ids, params: SamplingParams, constraint: Constraint | None = None, caller: Caller | None = None
    ) -> Sequence:
        """Queue a request of ``caller``, whose reply is what ``constraint`` allows.

        Raises:
            RequestError: see ``check``; or a biased token is outside the vocabulary.
        """
        tokens = tuple(self.check(prompt).tolist())
        if bad := [token for token, _ in params.logit_bias if token >= self._vocab_size]:
            raise RequestError(f"logit_bias: token id {bad[0]} is outside the vocabulary of {self._vocab_size}")
        sampler = Sampler(params, tokens, constraint)
        limit = self.context if params.max_tokens is None else min(self.context, len(tokens) + params.max_tokens)
        usage = Usage(time.perf_counter())
        sequence = Sequence(next(self._ids), tokens, params, sampler, usage, limit, caller or Caller())
        self._scheduler.add(sequence, self._prefixes.kept if self._prefixes is not None else None)
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
            with self.running:
                if self._half_way:
                    self._recover()
                self._half_way = True
                result[chunk] = self._model.forward(batch)
                self._half_way = False
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
        self._end_rest()
        if self._prefixes is not None:
            self._prefixes.close()

    def step(self) -> list[TokenEvent]:
        """Run one step over all that is due, or a part of one.

        Returns:
            One event for each sequence that got a token or ended; empty when the engine is idle or only a part of a
            prompt was read.

        Raises:
            BaseException: KeyboardInterrupt and the like, after cancelling the sequences of the step.
        """
        with self.running:
            return self._step()

    def _step(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        work: Pass | None = None
        chunks: list[tuple[Sequence, int]] = []
        try:
            self._end_rest()  # if that fails, so will the recovery before the next pass, and its sequences are told
            events += [event for sequence in self._scheduler.admit() if (event := self._start(sequence)) is not None]
            work = self._due()
            if work is None:
                chunks = self._next_chunks()
                work = self._begin(chunks) if chunks else None
            if work is None:
                return events
            chunks = work.chunks
            logits = self._run(work)
            return events if logits is None else events + self._postprocess(work, logits)
        except Exception as error:
            return events + [self._fail(sequence, error) for sequence, _ in chunks if not sequence.finished]
        except BaseException:
            for sequence, _ in chunks:
                self.abort(sequence)
            raise
        finally:
            if work is not None and work is not self._resting:
                work.layers.close()  # no effect, unless it was interrupted when it rested already
                for sequence in work.sequences:
                    if sequence.finished:  # at a rest, when its memory was still held by the pass
                        self._states.release(sequence)

    def _start(self, sequence: Sequence) -> TokenEvent | None:
        """Give a sequence its states, with what the prefix cache has of its prompt."""
        try:
            sequence.usage.started = sequence.usage.started or time.perf_counter()
            sequence.states = self._model.new_states(sequence.limit)
            if self._prefixes is not None and not sequence.scored:
                known = (*sequence.prompt, *sequence.tokens)
                sequence.computed = self._prefixes.start(known, sequence.states)
                if not sequence.replay:
                    sequence.cached = sequence.computed
        except Exception as error:
            return self._fail(sequence, error)
        return None

    def _due(self) -> Pass | None:
        """The pass at rest, if it is its turn."""
        decoding = any(s.decoding for s in self._scheduler.running)
        return None if self._decode_next and decoding else self._resting

    def _next_chunks(self) -> list[tuple[Sequence, int]]:
        """What a new pass computes: prompts that take long by themselves, so that it can rest, or else all."""
        apart = self._resting.sequences if self._resting is not None else ()
        for sequence in self._scheduler.make_room([s for s in self._scheduler.running if s.decoding], apart):
            self._stop(sequence)
        decoding = any(s.decoding for s in self._scheduler.running)
        if self._resting is not None:
            if not decoding:  # all replies gave way: the pass at rest goes on next, as only one can rest
                return []
            room = self._prefill_chunk - len(self._resting.batch.ids)  # what memory is planned for
            return self._scheduler.schedule(self._pace.room(room), apart)
        if decoding and self._decode_next:
            return self._scheduler.schedule(self._pace.room(self._prefill_chunk))
        chunks = self._scheduler.schedule(self._prefill_chunk)
        prompts = [(s, count) for s, count in chunks if not s.decoding]
        short = sum(count for _, count in prompts) <= self._pace.room(self._prefill_chunk)
        return prompts if decoding and prompts and not short else chunks

    def _stop(self, sequence: Sequence) -> None:
        """Take the states of a sequence away; it will read its prompt and what it has replied again."""
        if self._prefixes is not None and sequence.tokens and sequence.states is not None:
            self._prefixes.keep_end((*sequence.prompt, *sequence.tokens), sequence.states)
        if not sequence.tokens:
            sequence.prompt_logprobs.clear()
        self.preemptions += 1
        sequence.replay, sequence.computed, sequence.states = len(sequence.tokens), 0, None

    def _begin(self, chunks: list[tuple[Sequence, int]]) -> Pass:
        if self.on_step is not None:
            self.on_step(chunks)
        batch, wanted = batch_of(chunks)
        if self.on_progress is not None:
            batch.on_layer = prompt_progress(chunks, self.on_progress)
        return Pass(chunks, batch, wanted, self._model.layers(batch))

    def _run(self, work: Pass) -> F32 | None:
        """Go on with a pass; None if it rests."""
        if self._half_way:
            self._recover()
        if work is self._resting:
            self._resting = None
        if self.on_pass is not None:
            self.on_pass(work)
        before = self._counters()
        self._half_way = True  # stays so when it raises, and when a second Ctrl-C ends the recovery
        with np.errstate(all="ignore"):  # NaN and Inf are looked for in the logits
            logits = self._pace.run(work)
        self._half_way = False
        work.io += self._counters() - before
        self._decode_next = work.pausable
        if logits is None:
            self._resting = work
        return logits

    def _postprocess(self, work: Pass, logits: F32) -> list[TokenEvent]:
        total = sum(count for _, count in work.chunks)
        failed: dict[int, MoestreamError] = {}
        for row, error in work.batch.failures:
            index = next(i for i, s in enumerate(work.batch.segments) if s.start <= row < s.start + s.length)
            failed.setdefault(index, error)
        events = []
        for index, (sequence, count) in enumerate(work.chunks):
            sequence.computed += count
            sequence.usage.io += work.io.scaled(count / total)
            if index in failed and not sequence.finished:
                events.append(self._fail(sequence, failed[index]))
        start = 0
        for sequence, count in work.wanted:
            own = logits[start : start + count]
            start += count
            if sequence.finished or not count:
                continue
            score_prompt(sequence, own)
            if sequence.decoding:
                if not sequence.tokens and sequence.states is not None:
                    if self._prefixes is not None:
                        self._prefixes.keep(sequence.prompt, sequence.states)
                    followers = self._scheduler.admit_followers(sequence)
                    events += [self._follow(follower, sequence, own[-1]) for follower in followers]
                events.append(self._sample(sequence, own[-1]))
        return events

    def _follow(self, sequence: Sequence, leader: Sequence, logits: F32) -> TokenEvent:
        """Start where the one that read the same prompt stands, whose logits [V] are these."""
        try:
            assert leader.states is not None
            sequence.states = self._model.new_states(sequence.limit)
            sequence.states.copy_from(leader.states)
        except Exception as error:
            return self._fail(sequence, error)
        sequence.computed, sequence.cached = leader.computed, leader.cached
        sequence.usage.started = max(sequence.usage.added, leader.usage.started or 0.0)
        return self._sample(sequence, logits)

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
        at_rest = self._resting.sequences if self._resting is not None else []
        if self._half_way or sequence in at_rest or reason == "error":
            sequence.states = None  # they stand somewhere between two tokens
        states, sequence.states = sequence.states, None
        self._scheduler.remove(sequence)
        if sequence not in at_rest:
            self._states.release(sequence)  # its memory is free for the next one
        elif not self._half_way:
            self._end_rest()
        if self._prefixes is not None and states is not None and sequence.tokens:
            self._prefixes.keep_end((*sequence.prompt, *sequence.tokens), states)

    def _end_rest(self) -> None:
        """Let go of the pass at rest if all its sequences have ended."""
        work = self._resting
        if work is None or not all(s.finished for s in work.sequences):
            return
        with self.running:
            half_way, self._half_way, self._resting = self._half_way, True, None  # stays so when what follows fails
            for sequence in work.sequences:
                self._states.release(sequence)
            if half_way:
                self._recover()
            work.layers.close()
            self._half_way = False
