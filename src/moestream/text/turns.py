"""Whose turn it is to use the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """A re-entrant lock that one can wait for together with something else, and that running steps cannot hog.

    A plain lock goes to whoever asks first, which is the thread that has just released it: one that runs step after
    step would keep all others out.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: int | None = None
        self._depth = 0
        self._asking = 0  # threads waiting in __enter__, who go before those that wait for a step

    def __enter__(self) -> None:
        """Wait for the turn."""
        with self._changed:
            self._asking += 1
            try:
                self._changed.wait_for(lambda: self._owner in (None, threading.get_ident()))
                self._take()
            finally:
                self._asking -= 1

    def __exit__(self, *_: object) -> None:
        """End the turn."""
        self._leave()

    @contextmanager
    def step(self, unless: Callable[[], object]) -> Iterator[bool]:
        """Wait for the turn, or until ``unless`` holds at the end of another's; yields whether the turn was got."""

        def due() -> bool:
            mine = self._owner == threading.get_ident()
            return bool(unless()) or mine or (self._owner is None and not self._asking)

        with self._changed:
            self._changed.wait_for(due)
            got = not unless()
            if got:
                self._take()
        try:
            yield got
        finally:
            if got:
                self._leave()

    def forget(self) -> None:
        """Give up what this thread holds, after an interrupt that may have struck between taking and using it."""
        with self._changed:
            if self._owner == threading.get_ident():
                self._depth = 1
                self._leave()

    def _take(self) -> None:
        self._owner = threading.get_ident()
        self._depth += 1

    def _leave(self) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify_all()
