"""Which sequences run in the next step, and how many tokens of each."""

from __future__ import annotations

from collections import deque

from moestream.engine.sequence import Sequence

SCORED_ROWS = 128
"""Prompt tokens of a step whose log probabilities are wanted: their logits are 4 bytes x vocabulary each."""


class Scheduler:
    """First come, first served.

    A step holds one token of every decoding sequence and up to ``prefill_chunk`` tokens of prompts. A long prompt
    thus passes in sweeps between which the others go on; short prompts share a sweep, so that an expert they all want
    is read once. At most ``max_batch`` sequences hold states at a time, which is what the memory plan counts on.
    """

    def __init__(self, max_batch: int, prefill_chunk: int) -> None:
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of arrival

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences without states yet."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences with states, some of which may still read their prompt."""
        return tuple(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished sequence, wherever it is."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """Sequences of the next step with the number of their next tokens; empty when nothing is left to do.

        Waiting sequences that fit become running ones; the caller gives them states.
        """
        chosen = [(s, 1) for s in self._running if s.decoding]
        room = self._prefill_chunk
        for s in self._running:
            if not s.decoding and room > 0:
                chosen.append((s, _next_chunk(s, room)))
                room -= chosen[-1][1]
        while self._waiting and room > 0 and len(self._running) < self._max_batch:
            s = self._waiting.popleft()
            self._running.append(s)
            chosen.append((s, _next_chunk(s, room)))
            room -= chosen[-1][1]
        return chosen


def _next_chunk(sequence: Sequence, room: int) -> int:
    """Prompt tokens of a sequence in a step that has room for so many."""
    most = room if sequence.params.prompt_logprobs is None else min(room, SCORED_ROWS)
    return min(most, len(sequence.prompt) - sequence.computed)
