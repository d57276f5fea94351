"""Streams the experts a layer needs from disk into slots, hits first.

Shape letters: T rows, k experts per row, m predicted experts per row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from moestream.checkpoint.encoding import ExpertTable
from moestream.config import CacheMode
from moestream.experts.arena import Arena
from moestream.experts.flight import Flight
from moestream.experts.governor import Governor
from moestream.experts.layer_plan import LayerPlan
from moestream.experts.policy import LFRU, LRU, NO_SLOT, SWEEP_ROWS, landing_slots
from moestream.experts.reader import BLOCK, FILE, Reader
from moestream.experts.resident import Residents, ResidentStream
from moestream.experts.stream import ExpertStream
from moestream.ops.base import I32

READ_AHEAD = 3
"""Missing experts read ahead for each row of a decode step: later guesses are wrong too often for the time there is."""
_POLL_SECONDS = 0.5  # a longer wait would delay Ctrl-C


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store did since it was made; the difference of two is one request's account."""

    bytes_read: int = 0
    """Read from disk, whole blocks for direct reads."""
    bytes_cached: int = 0
    """Served by the page cache (buffered modes on Linux)."""
    hits: int = 0
    """Experts that were kept in a slot, once per layer and step."""
    hits_ahead: int = 0
    """Experts that were in a slot because they had been read ahead of the router; not among ``hits``."""
    misses: int = 0
    """Experts that were in no slot, or still on their way."""
    failed: int = 0
    """Experts whose read failed for good."""
    stall_seconds: float = 0.0
    """Time spent waiting for reads with nothing else to do."""
    busy_seconds: float = 0.0
    """Time with at least one read in flight."""
    bytes_ahead: int = 0
    """Of the bytes read, experts that were read ahead and then asked for, landed by then or not."""
    bytes_wasted: int = 0
    """Of the bytes read, what no layer asked for."""
    stream_seconds: float = 0.0
    """Time from a router's choice to the use of its last expert, ``stall_seconds`` included."""

    def __sub__(self, before: StoreStats) -> StoreStats:
        return StoreStats(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float:
        """Share of experts that the cache had kept."""
        asked = self.hits + self.hits_ahead + self.misses
        return self.hits / asked if asked else 0.0

    @property
    def overlap(self) -> float:
        """Share of the disk's busy time hidden behind computation."""
        return min(1.0, max(0.0, 1.0 - self.stall_seconds / self.busy_seconds)) if self.busy_seconds else 1.0


def slot_nbytes(tables: Sequence[ExpertTable | None]) -> int:
    """Bytes of a slot that can hold any expert of any layer."""
    return max((LayerPlan(i, 0, t).slot_nbytes for i, t in enumerate(tables) if t is not None), default=BLOCK)


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
        self._flight = Flight(reader)
        self.on_route: Callable[[int, I32], None] | None = None
        self._plans: list[LayerPlan | None] = []
        layer_of_key: list[int] = []
        for layer, table in enumerate(tables):
            self._plans.append(None if table is None else LayerPlan(layer, len(layer_of_key), table))
            layer_of_key += [layer] * (0 if table is None else table.num_experts)
        self._open(files, direct=mode in ("arena", "none"))
        self.arena = Arena(slots, max((p.slot_nbytes for p in self._plans if p is not None), default=BLOCK))
        reader.attach(self.arena.memory)
        self._layer_of_key = layer_of_key
        self.policy = self._make_policy()
        fits = mode in ("arena", "hybrid") and slots >= len(layer_of_key)
        self._residents = Residents(self.arena, self._plans) if fits else None
        self.governor = Governor()
        self._active: ExpertStream | None = None
        self._wanted: deque[int] = deque()  # predicted keys without a slot, likeliest first
        self._ahead: set[int] = set()  # predicted keys with a slot, until their layer's turn
        self._landed: set[int] = set()  # those of them that are there
        self._layer = len(tables)  # of the latest stream
        self._step_rows = 0
        self._step_began = self._step_ended = 0.0
        self._needed_before = 0  # when the step began
        self._dry = False  # the last step needed no reads
        self._hits = self._misses = self._failed = self._hits_ahead = 0
        self._needed = self._bytes_ahead = 0
        self._stall = self._streaming = self._stream_began = 0.0

    @property
    def reader(self) -> Reader:
        """Does the reading; a wrapper may be put in its place between two steps."""
        return self._flight.reader

    @reader.setter
    def reader(self, reader: Reader) -> None:
        self._flight.reader = reader

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
        self._nbytes = [nbytes for plan in plans for nbytes in plan.disk_nbytes(self.direct)]  # by key

    def _make_policy(self) -> LFRU:
        if self.mode in ("page", "none"):
            return LRU(self.arena.slots, self._layer_of_key, reserve=self.arena.slots)
        return LFRU(self.arena.slots, self._layer_of_key, self._reserve(1))

    def _reserve(self, rows: int) -> int:
        """Slots to keep free in a step of so many rows."""
        if self.mode in ("page", "none"):
            return self.arena.slots
        return landing_slots(self.arena.slots, len(self._layer_of_key), rows)

    def stream(self, layer: int, ids: I32) -> ExpertStream | ResidentStream:
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
        self._begin(layer, len(ids))
        self._stream_began = time.perf_counter()
        # a sweep comes in waves of few experts, whose hidden values stay in cache
        short = self._residents is not None and len(ids) < SWEEP_ROWS
        if short and not (self.reading_anything() or self._wanted or self._landed):
            assert self._residents is not None
            wave = self._residents.wave(layer, plan, ids)
            if wave is not None:
                keys: list[int] = (wave.experts + plan.first_key).tolist()
                self.policy.record(layer, keys, np.diff(wave.starts).tolist(), len(ids))  # for whoever looks at it
                self.count(hits=len(keys), misses=0)
                self._step_ended = self._stream_began
                return ResidentStream(wave)
        self._active = ExpertStream(self, layer, plan, ids)
        return self._active

    def _begin(self, layer: int, rows: int) -> None:
        """Notice where a step begins, and let the governor judge the last one."""
        if layer <= self._layer:
            self._dry = self._step_rows > 0 and self._needed == self._needed_before
            if 0 < self._step_rows < SWEEP_ROWS and not self._dry:
                self.governor.step_ended(self._step_ended - self._step_began)
            self._step_rows, self._step_began, self._needed_before = rows, time.perf_counter(), self._needed
            self.policy.reserve = self._reserve(rows)
        self._layer = layer

    def predictions(self, layer: int, rows: int) -> int:
        """How many experts ``prefetch`` wants to be told for each of so many rows; 0: reading ahead would not pay.

        In a sweep, where the disk idles during the dense work and the union of the guesses is nearly always right, it
        always does; in decode if the governor found so.
        """
        plan = self._plans[layer]
        if plan is None or self._dry:
            return 0
        return plan.num_experts if rows >= SWEEP_ROWS or self.governor.on else 0

    def prefetch(self, layer: int, ids: I32) -> None:
        """Read experts that a layer will probably choose, when nothing that is waited for wants disk or slots.

        In decode only the likeliest of those that are missing. Only slots that hold nothing are used, so it costs
        nobody a place. When the layer's turn comes, what has landed is there, what is being read goes first, and the
        rest is dropped.

        Args:
            layer: Whose turn is next.
            ids: Predicted experts [T, m], the likeliest of each row first.
        """
        plan = self._plans[layer]
        if plan is None or not ids.size:
            return
        order = ids[0]
        if len(ids) > 1:
            weights = np.broadcast_to(np.arange(ids.shape[1], 0, -1), ids.shape)  # [T, m], by rank
            score = np.bincount(ids.reshape(-1), weights.reshape(-1))
            order = (-score).argsort(kind="stable")[: np.count_nonzero(score)]
        slot_of = self.policy.slot_of
        keys = (order + plan.first_key).tolist()
        missing = [key for key in keys if slot_of[key] == NO_SLOT]
        self._wanted = deque(missing if len(ids) >= SWEEP_ROWS else missing[: READ_AHEAD * len(ids)])
        self.read_ahead()

    @property
    def experts(self) -> list[int]:
        """Experts of each layer; the keys number them in this order."""
        return [0 if plan is None else plan.num_experts for plan in self._plans]

    @property
    def direct(self) -> bool:
        """Whether every file is read past the page cache; not in modes ``page`` and ``hybrid``, or where it refuses."""
        return all(self.reader.is_direct(file) for file in self._files)

    def reset(self) -> None:
        """Forget what is in the slots, after an exception (Ctrl-C) may have left a stream anywhere in the middle."""
        if self._active is not None:
            self._active.abandon()
            self._active = None
        self.reader.cancel_prefetch()
        while self.reader.outstanding():
            self.reader.wait(1, _POLL_SECONDS)
        self.reader.wait(0, 0.0)  # reports nobody waits for any more
        self._flight.forget()
        self._wanted.clear()
        self._ahead.clear()
        self._landed.clear()
        self._step_rows = 0
        self.policy = self._make_policy()
        if self._residents is not None:
            self._residents.clear()

    def stats(self) -> StoreStats:
        """A snapshot; subtract an earlier one."""
        c = self.reader.counters()
        running = time.perf_counter() - self._stream_began if self._active is not None else 0.0
        return StoreStats(
            bytes_read=c.bytes_disk,
            bytes_cached=c.bytes_cached,
            hits=self._hits,
            misses=self._misses,
            failed=self._failed,
            stall_seconds=self._stall,
            busy_seconds=c.busy_seconds,
            hits_ahead=self._hits_ahead,
            bytes_ahead=self._bytes_ahead,
            bytes_wasted=max(0, c.bytes_disk + c.bytes_cached - self._needed),
            stream_seconds=self._streaming + running,
        )

    def close(self) -> None:
        """End the active stream, drop what is read ahead and give the memory back."""
        if self._active is not None:
            self._active.close()
        self.claim([])
        while len(self._flight) and self.reader.outstanding():
            self.wait()
        self.reader.detach(self.arena.memory)

    # What follows is for ExpertStream.

    def claim(self, keys: Sequence[int]) -> set[int]:
        """A layer's turn has come: of what was read ahead, keep what it asks for.

        Returns:
            Those of ``keys`` that have landed, still pinned. Those on their way are demand reads from now on.
        """
        self._wanted.clear()
        if not len(self._flight) and not self._landed:
            return set()
        wanted = self._ahead.intersection(keys)
        self._flight.cancel(self._ahead - wanted)
        self.wait(0.0)
        used, wrong = self._landed & wanted, self._landed - wanted
        self._ahead, self._landed = set(), set()
        self.policy.release(list(wrong))
        nbytes = sum(self._nbytes[key] for key in used)
        self._needed += nbytes
        self._bytes_ahead += nbytes + sum(self._nbytes[key] for key in self._flight.promote(keys))
        self._hits_ahead += len(used)
        return used

    def read_ahead(self) -> bool:
        """Read predicted experts into slots that hold nothing; True if more of them would be welcome."""
        if not self._wanted or (self._active is not None and self._active.wants_slots):
            return bool(self._wanted)
        keys: list[int] = []
        while self._wanted and self.policy.free():
            key = self._wanted.popleft()
            if self.policy.slot_of[key] == NO_SLOT:
                self.policy.acquire(key)
                keys.append(key)
        if keys:
            self._ahead.update(keys)
            self._submit(keys, ahead=True)
        return bool(self._wanted)

    def submit(self, keys: list[int]) -> None:
        """Read experts of one layer that have slots and are waited for."""
        self._submit(keys, ahead=False)

    def _submit(self, keys: list[int], ahead: bool) -> None:
        slot_of = self.policy.slot_of
        plan = self._plans[self._layer_of_key[keys[0]]]
        assert plan is not None  # keys exist only for layers with experts
        self._flight.submit(keys, plan.ranges(keys, [slot_of[key] for key in keys], self.arena), ahead)

    def wait(self, timeout: float = _POLL_SECONDS) -> bool:
        """Wait for a read to end and sort what came; False if nothing did."""
        start = time.perf_counter()
        landed, failed = self._flight.poll(timeout)
        self._stall += time.perf_counter() - start
        for read in landed:
            if self._residents is not None:
                self._residents.landed(read.key, self.policy.slot_of[read.key])
            if not read.ahead:
                self._needed += self._nbytes[read.key]
                self._stream.landed(read.key)
            elif read.key in self._ahead:
                self._landed.add(read.key)
            else:
                self.policy.release([read.key])  # its layer's turn is over
        for read, failure in failed:
            self.policy.discard(read.key)
            self._ahead.discard(read.key)
            if not read.ahead:  # else nobody needs it: whoever does will read it again and be told
                self._failed += 1
                self._stream.failed(read.key, failure)
        return bool(landed or failed)

    @property
    def _stream(self) -> ExpertStream:
        assert self._active is not None  # a stream ends when nothing it waits for is being read
        return self._active

    def reading(self, key: int) -> bool:
        """Whether the bytes of a key are on their way."""
        return key in self._flight

    def under_way(self) -> list[int]:
        """Keys whose bytes are on their way; any thread may ask."""
        return self._flight.keys()

    def reading_anything(self) -> bool:
        """Whether a slot may become free by waiting."""
        return len(self._flight) > 0

    def count(self, hits: int, misses: int) -> None:
        """A layer's experts were looked up."""
        self._hits += hits
        self._misses += misses

    def is_active(self, stream: ExpertStream) -> bool:
        """Whether it is the latest stream and has not ended."""
        return self._active is stream

    def ended(self, stream: ExpertStream) -> None:
        """A stream waits for nothing any more."""
        if self._active is stream:
            self._active = None
            self._step_ended = time.perf_counter()
            self._streaming += self._step_ended - self._stream_began
