"""How steps take turns, so that replies under way do not wait long for somebody's prompt.

A sweep over a streamed model reads nearly all its experts whatever its length: cutting a prompt into smaller chunks
would make every chunk cost almost as much. So a long sweep stays whole and rests between two of its pieces, such as two
waves of experts, while the others get their next token.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from moestream.engine.passes import Pass
from moestream.ops.base import F32


class Pace:
    """Remembers how long passes took and decides what may run beside decoding sequences.

    Attributes:
        stall: Seconds that a prompt may keep replies waiting; None: until its chunk has been read.
    """

    def __init__(self, stall: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        """Nothing is known yet.

        Args:
            stall: See there.
            clock: Seconds.
        """
        self.stall = stall
        self._clock = clock
        self._seconds: dict[int, float] = {}  # at most, of a pass with fewer than 2**key prompt tokens
        self._decode = 0.0  # seconds of the latest step without prompts

    def run(self, work: Pass) -> F32 | None:
        """Go on with a pass; None if it rests.

        A rest comes before the piece that would exceed the bound, after one piece at least. Where decoding between two
        rests takes longer than the bound, the prompt gets as much time as that.
        """
        start = now = self._clock()
        slice_ends = start + max(self.stall or 0.0, self._decode)
        bounded = self.stall is not None and work.pausable
        while True:
            try:
                upcoming = next(work.layers)
            except StopIteration as end:
                work.seconds += self._clock() - start
                self._learn(work)
                logits: F32 = end.value
                return logits
            if not bounded:
                continue
            before, now = now, self._clock()
            work.took[work.upcoming], work.upcoming = now - before, upcoming
            if now + work.expected > slice_ends:
                work.layers.send(True)
                work.seconds += now - start
                return None

    def room(self, most: int) -> int:
        """Prompt tokens, up to ``most``, that a step of decoding sequences can take along within the bound."""
        if self.stall is None:
            return most
        known = [key for key, seconds in self._seconds.items() if seconds <= self.stall]
        return min(most, (1 << max(known, default=0)) - 1)

    def _learn(self, work: Pass) -> None:
        if tokens := work.prompt_tokens:
            most = (1 << tokens.bit_length()) - 1
            self._seconds[tokens.bit_length()] = work.seconds * most / tokens
        else:
            self._decode = work.seconds
