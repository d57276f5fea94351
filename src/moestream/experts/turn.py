"""What one forward pass has under way in the expert store."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moestream.experts.reader import ReadFailure

if TYPE_CHECKING:
    from moestream.experts.stream import ExpertStream


@dataclass(slots=True)
class Turn:
    """One pass at its turn, or at rest while another has one: its stream, what is read ahead for it, where it is.

    Keys in ``ahead`` are pinned, as are those that the stream waits for or holds; a key is in one of the two.
    """

    layer: int
    """Of the latest stream; at first beyond the last, so that the first stream begins a step."""
    rows: int = 0
    """Of the step; 0 before it begins."""
    began: float = 0.0
    ended: float = 0.0
    needed_before: int = 0
    """Bytes that had been needed when the step began."""
    dry: bool = False
    """The step before needed no reads."""
    stream: ExpertStream | None = None
    """What has not ended."""
    wanted: deque[int] = field(default_factory=deque)
    """Predicted keys without a slot, likeliest first."""
    ahead: set[int] = field(default_factory=set)
    """Predicted keys with a slot, until their layer's turn."""
    landed: set[int] = field(default_factory=set)
    """Those of them that are there."""

    def take(self, key: int) -> bool:
        """The bytes of a key are in its slot; False if nobody here waits for it."""
        if self.stream is not None and self.stream.landed(key):
            return True
        if key in self.ahead:
            self.landed.add(key)
            return True
        return False

    def lose(self, key: int, failure: ReadFailure) -> None:
        """A key cannot be read; its slot is gone."""
        if self.stream is not None:
            self.stream.failed(key, failure)
        self.ahead.discard(key)

    def give(self, keys: Iterable[int]) -> set[int]:
        """Leave what was read ahead to another that asks for it now; returns what has landed, still pinned."""
        given = self.ahead.intersection(keys)
        landed = self.landed & given
        self.ahead -= given
        self.landed -= given
        return landed

    def restart(self) -> None:
        """The store has forgotten everything: what was not used yet is read again when this one goes on."""
        self.wanted, self.ahead, self.landed = deque(), set(), set()
        if self.stream is not None:
            self.stream.restart()
