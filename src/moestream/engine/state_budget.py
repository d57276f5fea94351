"""Bytes for the states of running sequences: whoever starts reserves what it will hold, not the longest context."""

from __future__ import annotations

from moestream.engine.sequence import Sequence

PAGE = 256
"""Tokens by which a reservation grows."""


class StateBudget:
    """Accounts for states; allocates nothing."""

    def __init__(self, nbytes: int | None = None, per_token: int = 0, per_sequence: int = 0) -> None:
        """Nothing is reserved yet.

        Args:
            nbytes: To be shared; must hold one sequence of full length. None: no bound.
            per_token: Bytes of a token's keys and values, all layers.
            per_sequence: Bytes of the states that do not grow.
        """
        self._nbytes = nbytes
        self._per_token = per_token
        self._per_sequence = per_sequence
        self.reserved = 0

    def take(self, sequence: Sequence) -> bool:
        """Reserve what a sequence needs to read its prompt and begin its reply; False if there is not enough."""
        return self._reserve(sequence, len(sequence.prompt) + len(sequence.tokens) + 1)

    def grow(self, sequence: Sequence) -> bool:
        """Reserve what the next token needs; False if there is not enough."""
        return self._reserve(sequence, sequence.computed + 1)

    def release(self, sequence: Sequence) -> None:
        """Its states are gone."""
        self.reserved -= sequence.reserved
        sequence.reserved = 0

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        paged = min(-(-tokens // PAGE) * PAGE, sequence.limit)
        wanted = self._per_sequence + self._per_token * max(tokens, paged)
        more = wanted - sequence.reserved
        if more <= 0:
            return True
        if self._nbytes is not None and self.reserved + more > self._nbytes:
            return False
        self.reserved += more
        sequence.reserved = wanted
        return True
