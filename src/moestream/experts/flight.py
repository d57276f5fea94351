"""Reads under way. They belong to the store, not to a stream: what is read ahead is nobody's until its layer's turn.

Shape letters: m experts of a batch, G ranges of one expert.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass

from moestream.experts.reader import TICKET, Reader, ReadFailure
from moestream.ops.base import I64


@dataclass(slots=True)
class Read:
    """One expert on its way into its slot."""

    key: int
    ranges: I64  # [G, 5]
    ahead: bool
    """Nobody has asked for it yet."""
    retried: bool = False


class Flight:
    """Submits reads of experts and sorts what comes back. One read per key at a time."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._next_ticket = 0
        self._reads: dict[int, Read] = {}  # by ticket
        self._ticket: dict[int, int] = {}  # by key

    def __contains__(self, key: int) -> bool:
        return key in self._ticket

    def __len__(self) -> int:
        return len(self._reads)

    def keys(self) -> list[int]:
        """What is being read; a copy, which any thread may ask for."""
        return list(self._ticket)

    def submit(self, keys: list[int], ranges: I64, ahead: bool, later: bool) -> None:
        """Read keys as one batch, ranges [m, G, 5]; ``ahead``: nobody waits for them; ``later``: after all others."""
        self._submit([Read(key, r, ahead) for key, r in zip(keys, ranges, strict=True)], ranges, later)

    def _submit(self, reads: list[Read], ranges: I64, later: bool) -> None:
        """Queue reads, whose ``ranges`` are rows of [m, G, 5]."""
        first = self._next_ticket
        self._next_ticket += len(reads)
        for ticket, row in enumerate(ranges, first):
            row[:, TICKET] = ticket
        self.reader.submit(ranges.reshape(-1, 5), later)
        for ticket, read in enumerate(reads, first):
            self._reads[ticket] = read
            self._ticket[read.key] = ticket

    def promote(self, keys: Iterable[int]) -> list[int]:
        """Somebody waits for these keys now, as far as they are under way; returns those that were read ahead."""
        tickets = [self._ticket[key] for key in keys if key in self._ticket]
        guessed = [ticket for ticket in tickets if self._reads[ticket].ahead]
        for ticket in guessed:
            self._reads[ticket].ahead = False
        if tickets:
            self.reader.promote(tickets)
        return [self._reads[ticket].key for ticket in guessed]

    def cancel(self, keys: Iterable[int]) -> None:
        """Nobody will want these keys: reads ahead that have not begun are dropped and reported as cancelled."""
        tickets = [self._ticket[key] for key in keys if key in self._ticket]
        if tickets:
            self.reader.cancel(tickets)

    def poll(self, timeout: float) -> tuple[list[Read], list[tuple[Read, ReadFailure]]]:
        """Wait until a read ends; returns what landed and what failed for good.

        A read that met EIO is tried once more. One that was cancelled and is wanted after all is read again.
        """
        done, failed = self.reader.wait(1, timeout)
        landed = [self._end(ticket) for ticket in done]
        lost = []
        for failure in failed:
            read = self._end(failure.ticket)
            if failure.code == errno.EIO and not read.retried:
                read.retried = True
                self._submit([read], read.ranges[None], read.ahead)
            elif failure.code == errno.ECANCELED and not read.ahead:
                self._submit([read], read.ranges[None], read.ahead)
            else:
                lost.append((read, failure))
        return landed, lost

    def _end(self, ticket: int) -> Read:
        read = self._reads.pop(ticket)
        del self._ticket[read.key]
        return read

    def forget(self) -> None:
        """Drop all accounts, when nothing is being read any more."""
        self._reads.clear()
        self._ticket.clear()
