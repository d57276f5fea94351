"""Decides by measurement whether reading ahead pays on this machine, for this model, now."""

from __future__ import annotations

import statistics

TRIAL = 24
"""Steps with and steps without reading ahead that are compared."""
HOLD = 464
"""Steps for which the faster way is kept. With a slower way in half of a trial, a tenth of difference costs 0.5 %."""


class Governor:
    """Alternates between reading ahead and not, step by step; then keeps the way with the lower median time.

    A trial alternates because everything else drifts: the disk, the neighbours, the contents of the cache. After
    ``HOLD`` steps it begins again.

    Attributes:
        on: Whether the present step reads ahead.
    """

    def __init__(self) -> None:
        self.on = True
        self._times: tuple[list[float], list[float]] = ([], [])  # without, with
        self._hold = 0

    def step_ended(self, seconds: float) -> None:
        """Account for a decode step that ran as ``on`` said, and choose how the next one runs."""
        if self._hold > 0:
            self._hold -= 1
            return
        without, ahead = self._times
        (ahead if self.on else without).append(seconds)
        if min(len(without), len(ahead)) < TRIAL:
            self.on = not self.on
            return
        self.on = statistics.median(ahead) <= statistics.median(without)
        self._hold = HOLD
        self._times = ([], [])
