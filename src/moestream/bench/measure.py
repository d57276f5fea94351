"""Prefill and decode of one sequence on a loaded model, step by step, with the store's own counters.

Shape letters: T rows, k experts per row.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from moestream.engine.load import Runtime
from moestream.engine.sampling import SamplingParams
from moestream.experts.reader import FILE, OFFSET, TICKET, Reader
from moestream.experts.stats import StoreStats
from moestream.models.blocks import ExpertSource, ExpertStream
from moestream.ops.base import I32, I64

WINDOW = 32
"""Tokens between two looks at the hit rate while warming up."""
WARM_TRIES = 3
STEADY = 0.02
"""The hit rate has settled when two windows differ by less."""


class CountingSource:
    """An expert source that counts the distinct experts each stream asks for."""

    def __init__(self, source: ExpertSource) -> None:
        self._source = source
        self.distinct = 0

    def stream(self, layer: int, ids: I32) -> ExpertStream:
        """As the wrapped source: ids [T, k]."""
        self.distinct += ids.size if len(ids) == 1 else len(np.unique(ids))  # a row's are distinct
        return self._source.stream(layer, ids)

    def at_rest(self) -> AbstractContextManager[None]:
        """As the wrapped source."""
        return self._source.at_rest()


class CountingReader:
    """A reader that notes what is submitted: every read passes here, whatever the store believes it did."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._submitted: list[I64] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def submit(self, ranges: I64, prefetch: bool = False) -> None:
        """As the wrapped reader: ranges [n, 5]."""
        first = np.unique(ranges[:, TICKET], return_index=True)[1]  # the first range of an expert stands for it
        self._submitted.append(ranges[first][:, [FILE, OFFSET]])
        self._reader.submit(ranges, prefetch)

    def take(self) -> list[int]:
        """How often each expert of each layer was read since the last call."""
        if not self._submitted:
            return []
        counts: list[int] = np.unique(np.concatenate(self._submitted), axis=0, return_counts=True)[1].tolist()
        self._submitted.clear()
        return counts


@dataclass(frozen=True, slots=True)
class Phase:
    """What some tokens took."""

    tokens: int
    seconds: float
    io: StoreStats
    distinct: int
    """Experts asked for: distinct ones of each layer and step."""
    expert_reads: int
    """Experts read, as submitted to the reader."""
    most_reads: int
    """Reads of one expert of one layer in one step, at most."""
    step_seconds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Tokens per second over the whole phase."""
        return self.tokens / self.seconds

    @property
    def median_rate(self) -> float:
        """Tokens per second of the median step of one token."""
        return 1.0 / statistics.median(self.step_seconds)


class Meter:
    """Feeds one sequence to an idle engine and keeps account of each step."""

    def __init__(self, runtime: Runtime) -> None:
        self._engine = runtime.engine
        self._runtime = runtime
        self._source = CountingSource(runtime.model.experts)
        runtime.model.experts = self._source
        self._reader = CountingReader(runtime.store.reader)
        runtime.store.reader = cast(Reader, self._reader)

    def start(self, prompt: Sequence[int], tokens: int) -> None:
        """End what runs and hand in a prompt that will get ``tokens`` greedy tokens, end tokens included."""
        self._engine.abort_all()
        self._engine.add(prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))

    def prefill(self, tokens: int) -> Phase:
        """Run until the first token; ``tokens`` is the length of the prompt."""
        return self._phase(tokens, 1)

    def warm_prefill(self, prompt: Sequence[int]) -> Phase:
        """Read a prompt again until every expert it needs is in a slot, and measure that; at most 3 times."""
        for _ in range(WARM_TRIES):
            self.start(prompt, 1)
            phase = self.prefill(len(prompt))
            if phase.expert_reads == 0:
                break
        return phase

    def decode(self, tokens: int) -> Phase:
        """Run ``tokens`` more steps of one token."""
        return self._phase(tokens, tokens)

    def warm_up(self, limit: int) -> int:
        """Decode until the hit rate settles, at most ``limit`` tokens; returns how many."""
        done, last = 0, math.inf
        while done < limit:
            window = self.decode(min(WINDOW, limit - done))
            done += window.tokens
            rate = window.io.hit_rate
            if abs(rate - last) < STEADY:
                break
            last = rate
        return done

    def _phase(self, tokens: int, events: int) -> Phase:
        store = self._runtime.store
        before, start = store.stats(), time.perf_counter()
        self._source.distinct = expert_reads = most_reads = 0
        times: list[float] = []
        while len(times) < events:
            step = time.perf_counter()
            for event in self._engine.step():
                if event.sequence.error is not None:
                    raise event.sequence.error
                times.append(time.perf_counter() - step)
            reads = self._reader.take()
            expert_reads += sum(reads)
            most_reads = max(most_reads, *reads, 0)
        return Phase(
            tokens=tokens,
            seconds=time.perf_counter() - start,
            io=store.stats() - before,
            distinct=self._source.distinct,
            expert_reads=expert_reads,
            most_reads=most_reads,
            step_seconds=tuple(times),
        )
