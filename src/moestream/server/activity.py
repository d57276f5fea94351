"""What the engine's steps bring and take: tokens and seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from moestream.engine.engine import Engine
from moestream.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the start, the step that runs included."""

    prompt_tokens: int = 0
    """Read; not those that the prefix cache had."""
    new_tokens: int = 0
    """Written, without the first of a reply, which the end of its prompt yields."""
    step_seconds: float = 0.0
    read_seconds: float = 0.0
    """Of steps that read prompts."""
    write_seconds: float = 0.0
    """Of steps that wrote tokens and have ended; the same step may do both."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One step on its way."""

    began: float
    rows: int
    """Of replies."""
    prompt: int
    """Prompt tokens of all steps that read these prompts; 0: it reads none."""
    read: float
    """Of them, read so far."""
    read_before: int


class Activity:
    """Written by the engine's thread, read by any other: whatever changes together is replaced at once."""

    def __init__(self, engine: Engine) -> None:
        self._now: tuple[Totals, _Step | None] = (Totals(), None)
        engine.on_step = self._begin
        engine.on_progress = self._progress

    def _begin(self, chunks: list[tuple[Sequence, int]]) -> None:
        reading = [sequence for sequence, _ in chunks if not sequence.decoding]
        before = sum(sequence.computed for sequence in reading)
        prompt = sum(len(sequence.prompt) for sequence in reading)
        self._now = (self._now[0], _Step(time.perf_counter(), len(chunks) - len(reading), prompt, before, before))

    def _progress(self, done: int, total: int) -> None:
        totals, step = self._now
        if step is not None:
            self._now = (totals, replace(step, read=step.prompt * done / total))

    def end_step(self) -> None:
        """No step runs any more; called by the engine's thread."""
        totals, step = self._now
        if step is not None:
            self._now = (_sum(totals, step, step.rows), None)

    def totals(self) -> Totals:
        """What was done so far."""
        totals, step = self._now
        return totals if step is None else replace(_sum(totals, step, 0), write_seconds=totals.write_seconds)

    def prompt(self) -> tuple[int, int] | None:
        """(tokens read, tokens in all) of the prompts that the running step reads; None if it reads none."""
        step = self._now[1]
        return (round(step.read), step.prompt) if step is not None and step.prompt else None


def _sum(totals: Totals, step: _Step, new: int) -> Totals:
    seconds = time.perf_counter() - step.began
    return Totals(
        totals.prompt_tokens + round(step.read - step.read_before),
        totals.new_tokens + new,
        totals.step_seconds + seconds,
        totals.read_seconds + (seconds if step.prompt else 0.0),
        totals.write_seconds + (seconds if step.rows else 0.0),
    )
