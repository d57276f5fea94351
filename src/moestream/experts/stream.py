"""The experts of one layer of one step, in the order in which their bytes arrive.

Shape letters: T rows, k experts per row, n distinct experts, P parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from moestream.errors import ReadError
from moestream.experts.layer_plan import LayerPlan
from moestream.experts.policy import NO_SLOT, SWEEP_ROWS
from moestream.experts.reader import ReadFailure, read_error
from moestream.experts.resident import group_pairs, uses
from moestream.ops.base import I32, Wave

if TYPE_CHECKING:
    from moestream.experts.store import ExpertStore

SWEEP_WAVE = 8
"""Experts of a wave while reads still want slots: a longer one would hold landed bytes, and the disk would idle."""
LONGEST_WAVE = 64
"""Experts of any wave of a sweep: it can rest between two. Shorter ones cost up to a tenth of what experts take."""


class ExpertStream:
    """Iterates over the waves of one layer. Experts are numbered 0..n-1: of one row in its order, else by their id.

    Attributes:
        failures: Pairs that have no result, with the reason; complete when the iteration has ended.
    """

    def __init__(self, store: ExpertStore, layer: int, plan: LayerPlan, ids: I32) -> None:
        self.failures: list[tuple[I32, ReadError]] = []
        self._store = store
        self._policy = store.policy
        self._layer = layer
        self._plan = plan
        self._experts, self._starts, self._pairs = group_pairs(ids, layer, plan)
        self._keys: list[int] = (self._experts + plan.first_key).tolist()
        self._counts: list[int] = uses(self._starts, len(ids))  # [n]
        self._policy.record(layer, self._keys, self._counts, len(ids))

        self._sweep = len(ids) >= SWEEP_ROWS
        self._abandoned = False
        self._current: list[int] = []  # in the wave being used
        self._ready: list[int] = []  # to yield next
        self._pending: deque[int] = deque()  # want a slot
        self._awaited: dict[int, int] = {}  # being read, by key
        held = store.claim(self._keys)
        self._look_up(range(len(self._keys)), held)
        store.count(hits=len(self._ready) - len(held), misses=len(self._pending) + len(self._awaited))
        self._submit_pending()

    def _look_up(self, experts: Iterable[int], held: Container[int]) -> None:
        """Sort experts by where they are: in a slot, on their way, or neither; keys in ``held`` are pinned for us."""
        slot_of, under_way = self._policy.slot_of, self._store.reading_anything()
        for i in experts:
            key = self._keys[i]
            if slot_of[key] == NO_SLOT:
                self._pending.append(i)
            elif under_way and self._store.reading(key):
                if self._store.shared(key):
                    self._policy.pin(key)
                self._awaited[key] = i
            else:
                self._ready.append(i)
                if key not in held:
                    self._policy.pin(key)

    @property
    def wants_slots(self) -> bool:
        """Whether an expert of this layer still waits for a place to be read to."""
        return bool(self._pending)

    def __iter__(self) -> Iterator[Wave]:
        return self

    def __next__(self) -> Wave:
        """The next wave; the last one's memory may be overwritten from now on.

        Waits until at least one expert has landed. An expert whose read fails (after one retry of EIO) is left out and
        named in ``failures``.

        Raises:
            RuntimeError: the stream was closed, or another one started, before it had ended.
        """
        if self._abandoned:
            raise RuntimeError(f"the expert stream of layer {self._layer} was closed before its end")
        self._release_current()
        self._submit_pending()
        crowded = bool(self._pending) or self._store.read_ahead()
        if crowded and self._awaited:
            self._store.wait(0.0)
        while not self._ready:
            if not self._awaited:
                if not self._pending:
                    self._finish()
                    raise StopIteration
                self._submit_pending(force=True)
                if not self._awaited and not self._store.reading_anything():
                    raise RuntimeError("every slot is in use by a stream that never ended: the store must be reset")
            self._store.wait()
        # While reads want slots, what landed last goes first: hits can wait in theirs.
        most = SWEEP_WAVE if crowded else LONGEST_WAVE if self._sweep else len(self._ready)
        cut = max(0, len(self._ready) - most)
        self._current, self._ready = sorted(self._ready[cut:]), self._ready[:cut]
        return self._wave(self._current)

    def close(self) -> None:
        """End early: reads in flight are waited for, so that no slot is reused while bytes still land in it."""
        self._abandoned |= self._store.is_active(self)
        self._pending.clear()
        while self._awaited:
            if not self._store.wait() and not self._store.reader.outstanding():
                break  # an interrupt lost the report: nothing is being read any more
        for key in self._awaited:
            self._policy.discard(key)
        self._awaited.clear()
        self._current += self._ready
        self._ready = []
        self._release_current()
        self._finish()

    def abandon(self) -> None:
        """The store has forgotten everything: no wave will come any more."""
        self._abandoned = True

    def pause(self) -> None:
        """Another pass goes first: the last wave's memory may be overwritten from now on, what is ready stays."""
        self._release_current()

    def resume(self) -> None:
        """Go on; the other pass may have brought what still had no slot."""
        pending, self._pending = self._pending, deque()
        self._store.promote([self._keys[i] for i in pending])
        self._look_up(pending, ())

    def restart(self) -> None:
        """The store has forgotten everything while this one was at rest: read again what was not used yet."""
        self._policy = self._store.policy
        self._pending = deque(sorted([*self._ready, *self._awaited.values(), *self._pending]))
        self._ready, self._awaited = [], {}

    def awaits(self, key: int) -> bool:
        """Whether a key is being read for this one."""
        return key in self._awaited

    def landed(self, key: int) -> bool:
        """The bytes of a key are in its slot; False if this one does not wait for it."""
        i = self._awaited.pop(key, None)
        if i is None:
            return False
        self._ready.append(i)
        return True

    def failed(self, key: int, failure: ReadFailure) -> None:
        """A key cannot be read; its slot is gone."""
        i = self._awaited.pop(key, None)
        if i is None:
            return
        pairs = self._pairs[self._starts[i] : self._starts[i + 1]]
        self.failures.append((pairs, read_error(self._store.reader, failure)))

    def _finish(self) -> None:
        self._store.ended(self)

    def _release_current(self) -> None:
        if self._current:
            self._policy.release([self._keys[i] for i in self._current])
            self._current = []

    def _submit_pending(self, force: bool = False) -> None:
        """Give slots to as many pending experts as the policy allows, and read them as one batch."""
        keys: list[int] = []
        while self._pending:
            i = self._pending[0]
            if self._policy.acquire(self._keys[i], force) is None:
                break
            self._pending.popleft()
            keys.append(self._keys[i])
            self._awaited[self._keys[i]] = i
            force = False
        if keys:
            self._store.submit(keys)

    def _wave(self, chosen: list[int]) -> Wave:
        experts, starts, pairs = self._experts, self._starts, self._pairs
        if len(chosen) < len(self._keys):
            experts = experts[chosen]
            rows = [pairs[starts[i] : starts[i + 1]] for i in chosen]
            pairs = np.concatenate(rows) if len(rows) > 1 else rows[0]
            starts = np.array([0, *accumulate(self._counts[i] for i in chosen)], np.int32)
        slot_of = self._policy.slot_of
        nbytes = self._store.arena.slot_nbytes
        offsets = self._plan.part_offsets[experts]  # [n, P], a copy
        offsets += np.array([[slot_of[self._keys[i]] * nbytes] for i in chosen], np.int64)
        return Wave(self._layer, self._plan.layout, experts, self._store.arena.memory, offsets, starts, pairs)
