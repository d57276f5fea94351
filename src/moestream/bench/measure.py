"""Prefill and decode of one sequence on a loaded model, step by step, with the store's own counters.

Shape letters: T rows, k experts per row.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moestream.engine.load import Runtime
from moestream.engine.sampling import SamplingParams
from moestream.experts.store import StoreStats
from moestream.models.blocks import ExpertSource, ExpertStream
from moestream.ops.base import I32

WINDOW = 32
"""Tokens between two looks at the hit rate while warming up."""
STEADY = 0.02
"""The hit rate has settled when two windows differ by less."""


class CountingSource:
    """An expert source that counts the distinct experts each stream asks for."""

    def __init__(self, source: ExpertSource) -> None:
        self._source = source
        self.distinct = 0

    def stream(self, layer: int, ids: I32) -> ExpertStream:
        """As the wrapped source: ids [T, k]."""
        self.distinct += len(np.unique(ids))
        return self._source.stream(layer, ids)


@dataclass(frozen=True, slots=True)
class Phase:
    """What some tokens took."""

    tokens: int
    seconds: float
    io: StoreStats
    bytes_asked: int
    """Bytes of experts asked from the reader, without the rounding to blocks."""
    distinct: int
    """Experts asked for: distinct ones of each layer and step."""
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

    def start(self, prompt: Sequence[int], tokens: int) -> None:
        """Hand in a prompt that will get ``tokens`` greedy tokens, end tokens included."""
        self._engine.add(prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))

    def prefill(self, tokens: int) -> Phase:
        """Run until the first token; ``tokens`` is the length of the prompt."""
        return self._phase(tokens, 1)

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
        store, reader = self._runtime.store, self._runtime.reader
        before, asked, start = store.stats(), reader.counters().bytes_asked, time.perf_counter()
        self._source.distinct = 0
        times: list[float] = []
        while len(times) < events:
            step = time.perf_counter()
            for event in self._engine.step():
                if event.sequence.error is not None:
                    raise event.sequence.error
                times.append(time.perf_counter() - step)
        return Phase(
            tokens=tokens,
            seconds=time.perf_counter() - start,
            io=store.stats() - before,
            bytes_asked=reader.counters().bytes_asked - asked,
            distinct=self._source.distinct,
            step_seconds=tuple(times),
        )
