"""Gives memory of the expert cache back while the rest of the system runs short of it.

A budget that nobody named takes most of what is free at the start. What is started later must find its memory too, and
an expert that was dropped is read again from the disk, so the cache gives way before the system swaps or kills.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

from moestream.config import format_size
from moestream.experts.store import ExpertStore
from moestream.system import memory

LOG = logging.getLogger("moestream.memory")
WORTHWHILE = 1 << 30
"""Bytes of slots; a smaller cache is no help to anybody."""
SHORT = 3
"""Memory is short where less than one third of what was left free at the start is available..."""
PLENTY = 2
"""...and plenty where more than twice of it was for ``PATIENCE`` looks."""
PATIENCE = 120
LEAST = 8
"""The cache keeps one eighth of its slots, whatever happens."""
_SECONDS = 0.25  # between two looks, of about 0.1 ms


class MemoryWatch:
    """Looks at the memory that is available, and sets ``store.slots``.

    Args:
        store: Whose cache gives way; in modes that leave caching to the system there is nothing to give.
        running: Held while the model runs; then slots are given up at the next layer, else at once.
        kept: Bytes that the budget left free.
        available: Bytes that could be used without swapping.
    """

    def __init__(
        self,
        store: ExpertStore,
        running: threading.RLock,
        kept: int,
        available: Callable[[], int] = lambda: memory().available,
    ) -> None:
        self._store, self._running, self._kept, self._available = weakref.ref(store), running, kept, available
        self._least = -(-store.arena.slots // LEAST)
        self._plenty = 0  # looks in a row that found so
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="moestream-memory", daemon=True)

    @staticmethod
    def helps(store: ExpertStore) -> bool:
        """Whether this store has much to give."""
        return store.mode in ("arena", "hybrid") and store.arena.slots * store.arena.slot_nbytes >= WORTHWHILE

    def start(self) -> None:
        """Look every quarter of a second from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking; the store may be closed then."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_SECONDS):
            store = self._store()
            if store is None:
                return
            self.look(store)
            del store

    def look(self, store: ExpertStore) -> None:
        """Give back what is missing, or take again what others no longer use."""
        if store.usable != store.policy.capacity:  # not all that was asked for has happened
            self._apply(store)
            return
        available = self._available()
        nbytes = store.arena.slot_nbytes
        self._plenty = self._plenty + 1 if available > PLENTY * self._kept else 0
        slots = store.slots
        if SHORT * available < self._kept:
            slots = max(self._least, slots - -(-(self._kept - available) // nbytes))
        elif self._plenty >= PATIENCE:
            slots = min(store.arena.slots, slots + (available - self._kept) // nbytes)
            self._plenty = 0
        if slots == store.slots:
            return
        LOG.info(
            "%s of memory available: the expert cache goes from %d to %d slots (%s)",
            *(format_size(available), store.slots, slots, format_size(slots * nbytes)),
        )
        store.slots = slots
        self._apply(store)

    def _apply(self, store: ExpertStore) -> None:
        if self._running.acquire(blocking=False):
            try:
                store.resize()
            finally:
                self._running.release()
