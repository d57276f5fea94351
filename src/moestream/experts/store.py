"""Streams the experts a layer needs from disk into slots, hits first.

Shape letters: T rows, k experts per row, m predicted experts per row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moestream.checkpoint.encoding import ExpertTable
from moestream.config import CacheMode
from moestream.experts.arena import Arena
from moestream.experts.flight import Flight
from moestream.experts.governor import Governor
from moestream.experts.layer_plan import LayerPlan, open_files
from moestream.experts.policy import LANDING_SLOTS, LFRU, LRU, NO_SLOT, SWEEP_ROWS, landing_slots
from moestream.experts.reader import BLOCK, Reader
from moestream.experts.resident import Residents, ResidentStream, uses
from moestream.experts.stats import Account, StoreStats
from moestream.experts.stream import ExpertStream
from moestream.experts.turn import Turn
from moestream.ops.base import I32

READ_AHEAD = 3
"""Missing experts read ahead for each row of a decode step: later guesses are wrong too often for the time there is."""
PIECES_AHEAD = 3
"""Pieces of what is read ahead, under way at a time: enough to keep a disk busy, and what is waited for waits for no
more."""
SWEEP_PIECES = 1000
"""In a sweep alone nothing goes before anything: as many as the reader has threads."""
_POLL_SECONDS = 0.5  # a longer wait would delay Ctrl-C


class ExpertStore:
    """Keeps experts in slots and streams in what is missing.

    One stream at a time: a new one ends the last, unless that is at rest. Not safe for use by several threads.

    Args:
        tables: Where each layer's experts lie; None for a layer without experts.
        files: The checkpoint's files, indexed by ``ExpertTable.ranges``.
        slots: Experts that fit in memory together; any number from 1 works, top-k and more is sensible.
        mode: ``arena``: direct reads, LFRU; ``page``: buffered reads, the OS caches; ``hybrid``: buffered reads, LFRU;
            ``none``: direct, nothing stays.
        reader: Does the reading; the store does not close it.

    Attributes:
        on_route: Told the layer and the router's choice [T, k] before they are streamed; for recording.
        slots: How many of the slots to use, from the next layer on; the system gets the others' memory. Any thread may
            set it.

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
        plans = [plan for plan in self._plans if plan is not None]
        self._files = open_files(reader, files, plans, direct=mode in ("arena", "none"))
        self._nbytes = [nbytes for plan in plans for nbytes in plan.disk_nbytes(self.direct)]  # by key
        self.slots, self._lent = slots, 0
        self.arena = Arena(slots, max((plan.slot_nbytes for plan in plans), default=BLOCK))
        reader.attach(self.arena.memory)
        self._layer_of_key = layer_of_key
        self.policy = self._make_policy()
        fits = mode in ("arena", "hybrid") and slots >= len(layer_of_key)
        self._residents = Residents(self.arena, self._plans) if fits else None
        self.governor = Governor()
        self._turn = Turn(len(tables))
        self._rested: Turn | None = None
        self._account = Account()
        self._stream_began = 0.0

    @property
    def reader(self) -> Reader:
        """Does the reading; a wrapper may be put in its place between two steps."""
        return self._flight.reader

    @reader.setter
    def reader(self, reader: Reader) -> None:
        self._flight.reader = reader

    def _make_policy(self) -> LFRU:
        if self.mode in ("page", "none"):
            return LRU(self.arena.slots, self._layer_of_key, reserve=self.arena.slots)
        return LFRU(self.arena.slots, self._layer_of_key, landing_slots(self.arena.slots, len(self._layer_of_key)))

    def _reserve(self, rows: int) -> int:
        """Slots to keep free in a step of so many rows."""
        if self.mode in ("page", "none"):
            return self.policy.capacity
        return landing_slots(self.policy.capacity, len(self._layer_of_key), rows)

    def stream(self, layer: int, ids: I32) -> ExpertStream | ResidentStream:
        """Submit every read that the layer needs, as far as slots allow; iterate the result for the waves.

        Args:
            layer: Index into ``tables``.
            ids: The router's choice [T, k].

        Raises:
            ValueError: the layer has no experts, or an id is out of range.
        """
        turn = self._turn
        if turn.stream is not None:
            turn.stream.close()
        plan = self._plans[layer]
        if plan is None:
            raise ValueError(f"layer {layer} has no experts")
        if self.on_route is not None:
            self.on_route(layer, ids)
        if self.policy.capacity != self.usable and (self._rested is None or layer <= turn.layer):
            self.resize()
        self._begin(layer, len(ids))
        self._stream_began = time.perf_counter()
        # a sweep comes in waves of few experts, whose hidden values stay in cache
        short = self._residents is not None and len(ids) < SWEEP_ROWS
        if short and not (self.reading_anything() or turn.wanted or turn.landed):
            assert self._residents is not None
            wave = self._residents.wave(layer, plan, ids)
            if wave is not None:
                keys: list[int] = (wave.experts + plan.first_key).tolist()
                self.policy.record(layer, keys, uses(wave.starts, len(ids)), len(ids))  # for whoever looks at it
                self.count(hits=len(keys), misses=0)
                turn.ended = self._stream_began
                return ResidentStream(wave)
        turn.stream = ExpertStream(self, layer, plan, ids)
        return turn.stream

    def _begin(self, layer: int, rows: int) -> None:
        """Notice where a step begins, and let the governor judge the last one of this turn."""
        turn = self._turn
        if layer <= turn.layer:
            turn.dry = turn.rows > 0 and self._account.needed == turn.needed_before
            if 0 < turn.rows < SWEEP_ROWS and not turn.dry:
                self.governor.step_ended(turn.ended - turn.began)
            turn.rows, turn.began, turn.needed_before = rows, time.perf_counter(), self._account.needed
            self._make_way()
        turn.layer = layer

    def _make_way(self) -> None:
        """Keep free what the step needs, besides what the pass at rest has not used yet, and give its reads way."""
        reserve = self._reserve(self._turn.rows)
        if reserve and self._rested is not None:  # where all experts fit, none may be evicted
            reserve = min(self.policy.capacity, reserve + self.policy.unused())
        self.policy.reserve = reserve
        self.policy.release(())
        self.reader.limit_prefetch(SWEEP_PIECES if self._sweeps() else PIECES_AHEAD)

    @property
    def usable(self) -> int:
        """Slots to use from the next layer on: those that are not lent, at least half."""
        return max(-(-self.slots // 2), self.slots - self._lent)

    def lend(self, slots: int) -> None:
        """Do without the memory of so many slots until told otherwise: a pass that begins now needs it."""
        self._lent = slots
        if self.policy.capacity != self.usable:
            self.resize()

    def resize(self) -> None:
        """Use as many slots as are usable, as far as a pass at rest allows; only while no wave is in use."""
        slots, policy = self.usable, self.policy
        if slots < policy.capacity:
            self._residents = None  # from now on experts come, go and move
        if slots < policy.capacity and self._rested is not None:  # others need some beside what is held for it
            slots = min(policy.capacity, max(slots, policy.capacity - policy.spare() + LANDING_SLOTS))
        given_up, moves = policy.resize(slots)
        self.arena.move(moves)
        self.arena.discard(given_up)
        self._make_way()

    def _sweeps(self) -> bool:
        """Whether this turn's reads go after all others; not while one at rest waits for this one."""
        return self._turn.rows >= SWEEP_ROWS and self._rested is None

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While entered, another pass may stream; then this one goes on where it was.

        What this one is reading or has not used yet keeps its slots, as far as the other has enough; its reads go on,
        behind those of the other. One that ends by an exception instead of going on gives everything back.

        Raises:
            RuntimeError: a pass is at rest already.
        """
        if self._rested is not None:
            raise RuntimeError("a pass is at rest already: only one can be")
        turn, since = self._turn, time.perf_counter()
        try:
            self._set_aside(turn)
            yield
            self._take_back(turn)
            turn.began += time.perf_counter() - since
        except BaseException:
            try:
                if turn.stream is not None:
                    turn.stream.close()
                self._drop_guesses(turn)
            finally:
                self._rested = None
            raise

    def _set_aside(self, turn: Turn) -> None:
        if turn.stream is not None:
            turn.stream.pause()
            self._account.streaming += time.perf_counter() - self._stream_began
        if self.policy.spare() < LANDING_SLOTS:
            self._drop_guesses(turn)
        self._turn, self._rested = Turn(len(self._plans)), turn

    def _take_back(self, turn: Turn) -> None:
        if self._turn.stream is not None:
            self._turn.stream.close()
        self._drop_guesses(self._turn)
        self._turn, self._rested = turn, None
        self._make_way()
        self._stream_began = time.perf_counter()
        if turn.stream is not None:
            turn.stream.resume()

    def _drop_guesses(self, turn: Turn) -> None:
        """Nobody waits for what was read ahead: what has landed competes for its place, reads that run just end."""
        self._flight.cancel(turn.ahead)
        self.policy.release(list(turn.landed))
        turn.wanted, turn.ahead, turn.landed = deque(), set(), set()

    def predictions(self, layer: int, rows: int) -> int:
        """How many experts ``prefetch`` wants to be told for each of so many rows; 0: reading ahead would not pay.

        In a sweep, where the disk idles during the dense work and the union of the guesses is nearly always right, it
        always does; in decode if the governor found so.
        """
        plan = self._plans[layer]
        if plan is None or self._turn.dry:
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
        self._turn.wanted = deque(missing if len(ids) >= SWEEP_ROWS else missing[: READ_AHEAD * len(ids)])
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
        """Forget what is in the slots, after an exception (Ctrl-C) may have left a stream anywhere in the middle.

        A pass at rest has no part in it: it will read again what it had not used yet.
        """
        if self._turn.stream is not None:
            self._turn.stream.abandon()
        self.reader.cancel_prefetch()
        while self.reader.outstanding():
            self.reader.wait(1, _POLL_SECONDS)
        self.reader.wait(0, 0.0)  # reports nobody waits for any more
        self._flight.forget()
        self._turn = Turn(len(self._plans))
        self.policy = self._make_policy()
        if self._residents is not None:
            self._residents.clear()
        if self._rested is not None:
            self._rested.restart()

    def stats(self) -> StoreStats:
        """A snapshot; subtract an earlier one."""
        running = time.perf_counter() - self._stream_began if self._turn.stream is not None else 0.0
        return self._account.stats(self.reader.counters(), running)

    def close(self) -> None:
        """End all streams, drop what is read ahead and give the memory back."""
        for turn in self._turns():
            if turn.stream is not None:
                turn.stream.close()
            self._drop_guesses(turn)
        while len(self._flight) and self.reader.outstanding():
            self.wait()
        self.reader.detach(self.arena.memory)

    # What follows is for ExpertStream.

    def claim(self, keys: Sequence[int]) -> set[int]:
        """A layer's turn has come: of what was read ahead, for a pass at rest too, keep what it asks for.

        Returns:
            Those of ``keys`` that have landed, still pinned. Those on their way are demand reads from now on.
        """
        turn = self._turn
        turn.wanted.clear()
        if not len(self._flight) and not turn.landed and self._rested is None:
            return set()
        wanted = turn.ahead.intersection(keys)
        self._flight.cancel(turn.ahead - wanted)
        self.wait(0.0)
        used, wrong = turn.landed & wanted, turn.landed - wanted
        turn.ahead, turn.landed = set(), set()
        self.policy.release(list(wrong))
        if self._rested is not None:
            used |= self._rested.give(keys)
        nbytes = sum(self._nbytes[key] for key in used)
        self._account.needed += nbytes
        self._account.bytes_ahead += nbytes
        self._account.hits_ahead += len(used)
        self.promote(keys)
        return used

    def promote(self, keys: Sequence[int]) -> None:
        """Somebody waits for these keys now: what is on its way comes first."""
        self._account.bytes_ahead += sum(self._nbytes[key] for key in self._flight.promote(keys))

    def read_ahead(self) -> bool:
        """Read predicted experts into slots that hold nothing; True if more of them would be welcome."""
        turn = self._turn
        if not turn.wanted or (turn.stream is not None and turn.stream.wants_slots):
            return bool(turn.wanted)
        keys: list[int] = []
        while turn.wanted and self.policy.free():
            key = turn.wanted.popleft()
            if self.policy.slot_of[key] == NO_SLOT:
                self.policy.acquire(key)
                keys.append(key)
        if keys:
            turn.ahead.update(keys)
            self._submit(keys, ahead=True)
        return bool(turn.wanted)

    def submit(self, keys: list[int]) -> None:
        """Read experts of one layer that have slots and are waited for."""
        self._submit(keys, ahead=False)

    def _submit(self, keys: list[int], ahead: bool) -> None:
        slot_of = self.policy.slot_of
        plan = self._plans[self._layer_of_key[keys[0]]]
        assert plan is not None  # keys exist only for layers with experts
        ranges = plan.ranges(keys, [slot_of[key] for key in keys], self.arena)
        self._flight.submit(keys, ranges, ahead, ahead or self._sweeps())

    def wait(self, timeout: float = _POLL_SECONDS) -> bool:
        """Wait for a read to end and sort what came; False if nothing did."""
        start = time.perf_counter()
        landed, failed = self._flight.poll(timeout)
        self._account.stall += time.perf_counter() - start
        for read in landed:
            if self._residents is not None:
                self._residents.landed(read.key, self.policy.slot_of[read.key])
            if not read.ahead:
                self._account.needed += self._nbytes[read.key]
            if not any([turn.take(read.key) for turn in self._turns()]):  # all of them are told
                self.policy.release([read.key])  # its layer's turn is over
        for read, failure in failed:
            self.policy.discard(read.key)
            self._account.failed += not read.ahead  # else nobody needs it: whoever does will read it again and be told
            for turn in self._turns():
                turn.lose(read.key, failure)
        return bool(landed or failed)

    def _turns(self) -> list[Turn]:
        return [self._turn] if self._rested is None else [self._turn, self._rested]

    def reading(self, key: int) -> bool:
        """Whether the bytes of a key are on their way."""
        return key in self._flight

    def shared(self, key: int) -> bool:
        """Whether the pass at rest waits for a key, too."""
        stream = None if self._rested is None else self._rested.stream
        return stream is not None and stream.awaits(key)

    def under_way(self) -> list[int]:
        """Keys whose bytes are on their way; any thread may ask."""
        return self._flight.keys()

    def reading_anything(self) -> bool:
        """Whether a slot may become free by waiting."""
        return len(self._flight) > 0

    def count(self, hits: int, misses: int) -> None:
        """A layer's experts were looked up."""
        self._account.hits += hits
        self._account.misses += misses

    def is_active(self, stream: ExpertStream) -> bool:
        """Whether it is the latest stream of a pass and has not ended."""
        return any(turn.stream is stream for turn in self._turns())

    def ended(self, stream: ExpertStream) -> None:
        """A stream waits for nothing any more."""
        if self._turn.stream is stream:
            self._turn.ended = time.perf_counter()
            self._account.streaming += self._turn.ended - self._stream_began
        for turn in self._turns():
            if turn.stream is stream:
                turn.stream = None
