"""Streams the experts a layer needs from disk into slots, hits first.

Shape letters: T rows, k experts per row, n distinct experts, E experts of a layer, P parts, G ranges of one expert.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from moestream.checkpoint.encoding import ExpertLayout, ExpertTable
from moestream.config import CacheMode
from moestream.errors import ReadError, TensorError
from moestream.experts.arena import Arena, area_nbytes
from moestream.experts.policy import LFRU, LRU, NO_SLOT
from moestream.experts.reader import BLOCK, DEST, FILE, NBYTES, OFFSET, TICKET, Reader, ReadFailure, read_error
from moestream.ops.base import I32, I64, Wave

LANDING_SLOTS = 16
"""Slots kept free for bytes on their way, so that a layer's reads never wait for an eviction to be worth it."""
SWEEP_WAVE = 8
"""Experts of a wave while reads still want slots: a longer one would hold landed bytes, and the disk would idle."""
_POLL_SECONDS = 0.5  # a longer wait would delay Ctrl-C


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store did since it was made; the difference of two is one request's account."""

    bytes_read: int = 0
    """Read from disk, whole blocks for direct reads."""
    bytes_cached: int = 0
    """Served by the page cache (buffered modes on Linux)."""
    hits: int = 0
    """Experts found in a slot, once per layer and step."""
    misses: int = 0
    failed: int = 0
    """Experts whose read failed for good."""
    stall_seconds: float = 0.0
    """Time spent waiting for reads with nothing else to do."""
    busy_seconds: float = 0.0
    """Time with at least one read in flight."""

    def __sub__(self, before: StoreStats) -> StoreStats:
        return StoreStats(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float:
        """Share of experts that were in a slot."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0

    @property
    def overlap(self) -> float:
        """Share of the disk's busy time hidden behind computation."""
        return min(1.0, max(0.0, 1.0 - self.stall_seconds / self.busy_seconds)) if self.busy_seconds else 1.0


class _LayerPlan:
    """One layer's experts as rows of a batch, so that a submit is one fancy index.

    Parts that follow each other on disk for every expert are read as one range.
    """

    def __init__(self, layer: int, first_key: int, table: ExpertTable) -> None:
        self.layout: ExpertLayout = table.layout
        self.num_experts = table.num_experts
        self.first_key = first_key
        file, offset, nbytes = (table.ranges[:, :, i] for i in range(3))  # [E, P] each
        if not np.array_equal(nbytes, np.broadcast_to(np.array(table.layout.part_nbytes), nbytes.shape)):
            raise TensorError(f"layer {layer}: expert parts on disk do not have the sizes of {table.layout}")
        joins = (file[:, 1:] == file[:, :-1]) & (offset[:, 1:] == offset[:, :-1] + nbytes[:, :-1])
        heads = np.flatnonzero(np.concatenate([[True], ~joins.all(axis=0)]))  # [G], first part of each range
        sizes = np.add.reduceat(nbytes[0], heads)  # [G]
        areas = np.cumsum([0, *(area_nbytes(int(size)) for size in sizes)])
        self.slot_nbytes = int(areas[-1])

        dest = areas[:-1] + offset[:, heads] % BLOCK  # [E, G], within a slot
        self.rows = np.zeros((table.num_experts, len(heads), 5), np.int64)  # [E, G, 5]
        self.rows[:, :, FILE] = file[:, heads]
        self.rows[:, :, OFFSET] = offset[:, heads]
        self.rows[:, :, NBYTES] = sizes
        self.rows[:, :, DEST] = dest
        group = np.searchsorted(heads, np.arange(nbytes.shape[1]), side="right") - 1  # [P], range of each part
        self.part_offsets: I64 = dest[:, group] + offset - offset[:, heads[group]]  # [E, P], within a slot


def slot_nbytes(tables: Sequence[ExpertTable | None]) -> int:
    """Bytes of a slot that can hold any expert of any layer."""
    return max((_LayerPlan(i, 0, t).slot_nbytes for i, t in enumerate(tables) if t is not None), default=BLOCK)


class ExpertStore:
    """Keeps experts in slots and streams in what is missing.

    One stream at a time: a new one ends the last. Not safe for use by several threads.

    Args:
        tables: Where each layer's experts lie; None for a layer without experts.
        files: The checkpoint's files, indexed by ``ExpertTable.ranges``.
        slots: Experts that fit in memory together; any number from 1 works, top-k and more is sensible.
        mode: ``arena``: direct reads, LFRU; ``page``: buffered reads, the OS caches; ``hybrid``: buffered reads, LFRU;
            ``none``: direct, nothing stays.
        reader: Does the reading; the store does not close it.

    Attributes:
        on_route: Told the layer and the router's choice [T, k] before they are streamed; for recording.

    Raises:
        ReadError: a file cannot be opened.
        TensorError: a table does not match its layout.
        ValueError: ``slots`` is below 1.
    """

    def __init__(
        self,
        tables: Sequence[ExpertTable | None],
        files: Sequence[Path],
        slots: int,
        mode: CacheMode,
        reader: Reader,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.mode = mode
        self.reader = reader
        self.on_route: Callable[[int, I32], None] | None = None
        self._plans: list[_LayerPlan | None] = []
        layer_of_key: list[int] = []
        for layer, table in enumerate(tables):
            self._plans.append(None if table is None else _LayerPlan(layer, len(layer_of_key), table))
            layer_of_key += [layer] * (0 if table is None else table.num_experts)
        self._open(files, direct=mode in ("arena", "none"))
        self.arena = Arena(slots, max((p.slot_nbytes for p in self._plans if p is not None), default=BLOCK))
        reader.attach(self.arena.memory)
        self._layer_of_key = layer_of_key
        self.policy = self._make_policy()
        self._next_ticket = 0
        self._active: ExpertStream | None = None
        self._hits = self._misses = self._failed = 0
        self._stall = 0.0

    def _open(self, files: Sequence[Path], direct: bool) -> None:
        """Open the files that hold experts and put the reader's ids in the rows."""
        plans = [p for p in self._plans if p is not None]
        used = sorted({int(file) for plan in plans for file in np.unique(plan.rows[:, :, FILE])})
        ids = np.full(len(files), -1, np.int64)
        for file in used:
            ids[file] = self.reader.open(files[file], direct)
        for plan in plans:
            plan.rows[:, :, FILE] = ids[plan.rows[:, :, FILE]]
        self._files: list[int] = ids[used].tolist()

    def _make_policy(self) -> LFRU:
        slots = self.arena.slots
        if self.mode in ("page", "none"):
            return LRU(slots, self._layer_of_key, reserve=slots)
        everything_fits = slots >= len(self._layer_of_key)
        return LFRU(slots, self._layer_of_key, reserve=0 if everything_fits else min(LANDING_SLOTS, slots // 4))

    def stream(self, layer: int, ids: I32) -> ExpertStream:
        """Submit every read that the layer needs, as far as slots allow; iterate the result for the waves.

        Args:
            layer: Index into ``tables``.
            ids: The router's choice [T, k].

        Raises:
            ValueError: the layer has no experts, or an id is out of range.
        """
        if self._active is not None:
            self._active.close()
        plan = self._plans[layer]
        if plan is None:
            raise ValueError(f"layer {layer} has no experts")
        if self.on_route is not None:
            self.on_route(layer, ids)
        self._active = ExpertStream(self, layer, plan, ids)
        return self._active

    @property
    def direct(self) -> bool:
        """Whether every file is read past the page cache; False in modes ``page`` and ``hybrid`` or where it refuses."""
        return all(self.reader.is_direct(file) for file in self._files)

    def reset(self) -> None:
        """Forget what is in the slots, after an exception (Ctrl-C) may have left a stream anywhere in the middle."""
        if self._active is not None:
            self._active._abandoned = True
            self._active = None
        while self.reader.outstanding():
            self.reader.wait(1, _POLL_SECONDS)
        self.reader.wait(0, 0.0)  # reports nobody waits for any more
        self.policy = self._make_policy()

    def stats(self) -> StoreStats:
        """A snapshot; subtract an earlier one."""
        c = self.reader.counters()
        return StoreStats(
            c.bytes_disk, c.bytes_cached, self._hits, self._misses, self._failed, self._stall, c.busy_seconds
        )

    def close(self) -> None:
        """End the active stream and give the memory back."""
        if self._active is not None:
            self._active.close()
        self.reader.detach(self.arena.memory)


class ExpertStream:
    """Iterates over the waves of one layer. Experts are numbered 0..n-1 in increasing order of their id.

    Attributes:
        failures: Pairs that have no result, with the reason; complete when the iteration has ended.
    """

    def __init__(self, store: ExpertStore, layer: int, plan: _LayerPlan, ids: I32) -> None:
        self.failures: list[tuple[I32, ReadError]] = []
        self._store = store
        self._policy = store.policy
        self._layer = layer
        self._plan = plan
        flat = ids.reshape(-1)
        self._pairs = flat.argsort(kind="stable").astype(np.int32)  # [T * k], grouped by expert
        grouped = flat[self._pairs]
        if grouped.size and not 0 <= grouped[0] <= grouped[-1] < plan.num_experts:
            raise ValueError(f"layer {layer}: expert ids must lie in 0..{plan.num_experts - 1}")
        edges = np.flatnonzero(grouped[1:] != grouped[:-1]) + 1
        bounds = [0, *edges.tolist(), grouped.size] if grouped.size else [0]
        self._starts = np.array(bounds, np.int32)  # [n + 1]
        self._experts = grouped[self._starts[:-1]]  # [n]
        self._keys: list[int] = (self._experts + plan.first_key).tolist()
        self._policy.record(layer, self._keys, np.diff(self._starts).tolist(), len(ids))

        slot_of = self._policy.slot_of
        self._ready = [i for i, key in enumerate(self._keys) if slot_of[key] != NO_SLOT]  # to yield next
        self._pending = deque(i for i, key in enumerate(self._keys) if slot_of[key] == NO_SLOT)  # want a slot
        self._current: list[int] = []  # in the wave being used
        self._abandoned = False
        self._in_flight: dict[int, int] = {}  # ticket: expert
        self._retried: set[int] = set()
        for i in self._ready:
            self._policy.pin(self._keys[i])
        store._hits += len(self._ready)
        store._misses += len(self._pending)
        self._submit_pending()

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
        if self._pending and self._in_flight:
            self._wait(0.0)
        while not self._ready:
            if not self._in_flight:
                if not self._pending:
                    self._finish()
                    raise StopIteration
                self._submit_pending(force=True)
                if not self._in_flight:
                    raise RuntimeError("every slot is in use by a stream that never ended: the store must be reset")
            self._wait()
        # While reads want slots, what landed last goes first: hits can wait in theirs.
        cut = max(0, len(self._ready) - SWEEP_WAVE) if self._pending else 0
        self._current, self._ready = sorted(self._ready[cut:]), self._ready[:cut]
        return self._wave(self._current)

    def close(self) -> None:
        """End early: reads in flight are waited for, so that no slot is reused while bytes still land in it."""
        self._abandoned |= self._store._active is self
        self._pending.clear()
        while self._in_flight:
            if not self._wait() and not self._store.reader.outstanding():
                break  # an interrupt lost the report: nothing is being read any more
        for i in self._in_flight.values():
            self._policy.discard(self._keys[i])
        self._in_flight.clear()
        self._current += self._ready
        self._ready = []
        self._release_current()
        self._finish()

    def _finish(self) -> None:
        if self._store._active is self:
            self._store._active = None

    def _release_current(self) -> None:
        if self._current:
            self._policy.release([self._keys[i] for i in self._current])
            self._current = []

    def _submit_pending(self, force: bool = False) -> None:
        """Give slots to as many pending experts as the policy allows, and read them as one batch."""
        chosen: list[int] = []
        while self._pending:
            if self._policy.acquire(self._keys[self._pending[0]], force) is None:
                break
            chosen.append(self._pending.popleft())
            force = False
        if chosen:
            self._submit(chosen)

    def _submit(self, chosen: list[int]) -> None:
        store, slot_of = self._store, self._policy.slot_of
        slots = np.array([slot_of[self._keys[i]] for i in chosen], np.int64)
        batch = self._plan.rows[self._experts[chosen]]  # [m, G, 5], a copy
        batch[:, :, DEST] += (slots * store.arena.slot_nbytes + store.arena.address)[:, None]
        first = store._next_ticket
        store._next_ticket += len(chosen)
        batch[:, :, TICKET] = np.arange(first, store._next_ticket)[:, None]
        store.reader.submit(batch.reshape(-1, 5))
        self._in_flight.update(zip(range(first, store._next_ticket), chosen, strict=True))

    def _wait(self, timeout: float = _POLL_SECONDS) -> bool:
        """Wait for a read to finish and sort what came; False if none did."""
        start = time.perf_counter()
        done, failed = self._store.reader.wait(1, timeout)
        self._store._stall += time.perf_counter() - start
        self._ready += (self._in_flight.pop(ticket) for ticket in done)
        for failure in failed:
            self._failed(self._in_flight.pop(failure.ticket), failure)
        return bool(done or failed)

    def _failed(self, i: int, failure: ReadFailure) -> None:
        if failure.code == errno.EIO and i not in self._retried:
            self._retried.add(i)
            self._submit([i])
            return
        self._policy.discard(self._keys[i])
        self._store._failed += 1
        pairs = self._pairs[self._starts[i] : self._starts[i + 1]]
        self.failures.append((pairs, read_error(self._store.reader, failure)))

    def _wave(self, chosen: list[int]) -> Wave:
        experts, starts, pairs = self._experts, self._starts, self._pairs
        if len(chosen) < len(self._keys):
            experts = experts[chosen]
            pairs = np.concatenate([pairs[starts[i] : starts[i + 1]] for i in chosen])
            starts = np.concatenate([[0], np.cumsum(np.diff(starts)[chosen])], dtype=np.int32)
        slot_of = self._policy.slot_of
        slots = np.array([slot_of[self._keys[i]] for i in chosen], np.int64)
        offsets = self._plan.part_offsets[experts] + (slots * self._store.arena.slot_nbytes)[:, None]  # [n, P]
        return Wave(self._layer, self._plan.layout, experts, self._store.arena.memory, offsets, starts, pairs)
