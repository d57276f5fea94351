"""What the engine's steps bring and take: tokens and seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence as List
from dataclasses import dataclass, replace

from moestream.engine.engine import Engine
from moestream.engine.passes import Pass
from moestream.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the start, the step that runs included."""

    prompt_tokens: float = 0.0
    """Read; not those that the prefix cache had. A layer of n brings its n-th part of a token."""
    new_tokens: int = 0
    """Written, without the first of a reply, which the end of its prompt yields."""
    step_seconds: float = 0.0
    read_seconds: float = 0.0
    """Of steps that read prompts."""
    write_seconds: float = 0.0
    """Of steps that wrote tokens and have ended; the same step may do both."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One step on its way: a pass, or the part of one between two rests."""

    began: float
    rows: int = 0
    """Of replies."""
    prompt: int = 0
    """Rows of prompts."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """The prompts that were read last."""

    sequences: List[Sequence]
    read: float
    all: int


class Activity:
    """Written by the engine's thread, read by any other: whatever changes together is replaced at once."""

    def __init__(self, engine: Engine) -> None:
        self._now: tuple[Totals, _Step | None] = (Totals(), None)
        self._reading: _Reading | None = None
        engine.on_pass = self._run
        engine.on_progress = self._progress

    def begin_step(self) -> None:
        """The engine begins a step; called by its thread, as the methods below that change something."""
        self._now = (self._now[0], _Step(time.perf_counter()))

    def _run(self, work: Pass) -> None:
        totals, step = self._now
        reading = [sequence for sequence, _ in work.chunks if not sequence.decoding]
        if step is not None:
            self._now = (totals, replace(step, rows=len(work.chunks) - len(reading), prompt=work.prompt_tokens))
        if reading and (self._reading is None or self._reading.sequences != reading):
            prompt = sum(len(sequence.prompt) + sequence.replay for sequence in reading)
            self._reading = _Reading(reading, sum(sequence.computed for sequence in reading), prompt)

    def _progress(self, done: int, total: int) -> None:
        (totals, step), reading = self._now, self._reading
        if step is not None and reading is not None:
            layers = total / reading.all
            read = totals.prompt_tokens + step.prompt / layers
            self._now = (replace(totals, prompt_tokens=read), step)
            self._reading = replace(reading, read=done / layers)

    def end_step(self) -> None:
        """No step runs any more."""
        totals, step = self._now
        if step is not None:
            ended = _with(totals, step)
            if step.rows:
                written = ended.write_seconds + ended.step_seconds - totals.step_seconds
                ended = replace(ended, new_tokens=ended.new_tokens + step.rows, write_seconds=written)
            self._now = (ended, None)

    def totals(self) -> Totals:
        """What was done so far."""
        totals, step = self._now
        return totals if step is None else _with(totals, step)

    def prompt(self) -> tuple[int, int] | None:
        """(tokens read, tokens in all) of the prompts that are being read; None if there are none."""
        reading = self._reading
        if reading is None or all(sequence.decoding or sequence.finished for sequence in reading.sequences):
            return None
        return round(reading.read), reading.all


def _with(totals: Totals, step: _Step) -> Totals:
    """With the seconds of a step so far."""
    seconds = time.perf_counter() - step.began
    read = seconds if step.prompt else 0.0
    return replace(totals, step_seconds=totals.step_seconds + seconds, read_seconds=totals.read_seconds + read)
