"""Which experts stay in memory. Pure data structures: no I/O, no model, no clock; a trace can be replayed.

A *key* is one expert of one layer (``layer * E + expert`` or any dense numbering). A request is what one layer of one
step needs: a list of distinct keys. Every policy is a table of ``capacity`` slots:

    record(layer, keys, counts, rows)   the router chose these keys
    pin / acquire                       what is resident may not be evicted; what is not gets a slot (or None: wait)
    release(keys)                       the bytes were used; the policy decides what stays once nobody pins them
    discard(key)                        the read failed: the slot is free again
    resize(slots)                       use fewer slots, or those again that were given up
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from math import sqrt

import numpy as np

from moestream.errors import ConfigError
from moestream.ops.base import F32

NO_SLOT = -1
LANDING_SLOTS = 16
"""Slots kept free for bytes on their way, so that a layer's reads never wait for an eviction to be worth it."""
SWEEP_ROWS = 32
"""A step of so many rows is a sweep: it uses most experts of a layer."""
SWEEP_LANDING_SLOTS = 64
"""Slots kept free during a sweep, whose dense work on many rows takes as long as so many reads."""
POLICIES = ("lru", "lfru")
_EMPTY = float("inf")
_NONE = 1e-300  # tokens of a layer that never ran: may divide
_RESCALE = 2.0**200


def landing_slots(slots: int, experts: int, rows: int = 1) -> int:
    """How many of the slots to keep free for bytes on their way in a step of so many rows; none if all experts fit."""
    most = SWEEP_LANDING_SLOTS if rows >= SWEEP_ROWS else LANDING_SLOTS
    return 0 if slots >= experts else min(most, slots // 4)


class LFRU:
    """Least frequently and recently used: keeps the experts most probable to be asked for next.

    Each key's score is an exponentially decayed frequency of use per token of its layer (the LRFU family of Lee et al.,
    IEEE Trans. Computers 50(12), 2001: from LFU at an infinite half-life to LRU at a short one), divided by the
    decayed number of tokens, i.e. an estimate of the probability that the next token of that layer uses it. It is
    comparable between layers, so slots go where routing is concentrated, and it is the same for all keys of a uniform
    sweep, so a sweep larger than the cache keeps what it has instead of replacing everything (LRU then hits 0 %).
    A step of n rows counts as sqrt(n) tokens, because its rows are alike (one prompt) or are wanted together (a batch),
    and as at most one half-life.
    A half-life of 16 tokens is the robust choice: on recorded and simulated traces longer ones win up to 2 points where
    popularity drifts slowly and lose up to 9 where the topic changes every 30 tokens.

    At most ``capacity - reserve`` keys are kept; the other slots are for bytes on their way. A newcomer competes for
    its place when it has been used, and evicts earlier only what scores lower.

    Decay is applied forward (new uses weigh more), so scores only grow and one lazily repaired heap per layer gives
    the minimum: O(1) per hit, O(log E) and one search of a list of all layers per eviction.
    """

    def __init__(self, capacity: int, layer_of_key: Sequence[int], reserve: int = 0, half_life: float = 16.0) -> None:
        self.capacity = capacity
        self.reserve = min(reserve, capacity)
        self.slot_of = [NO_SLOT] * len(layer_of_key)
        """Slot of each key, or NO_SLOT."""
        self.pinned = bytearray(len(layer_of_key))
        """Users of each key; one without any is evictable or not resident."""
        self._new = bytearray(len(layer_of_key))  # per key: 1 resident and not used yet
        self._half_life = half_life
        self._growth = 2.0 ** (1.0 / half_life)
        self._layer_of = list(layer_of_key)
        layers = max(self._layer_of, default=0) + 1
        self._score = [0.0] * len(layer_of_key)
        self._weight = [1.0] * layers  # of one use now
        self._total = [_NONE] * layers  # decayed tokens, in the same unit as the scores
        self._free = list(range(capacity - 1, -1, -1))
        self._retired: list[int] = []
        self._heaps: list[list[tuple[float, int]]] = [[] for _ in range(layers)]  # (score once, key), evictable keys
        self._in_heap = bytearray(len(layer_of_key))
        self._lowest = [_EMPTY] * layers  # probability of each heap's top; of a stale one a lower bound
        self._kept = 0  # resident keys that were used at least once

    def record(self, layer: int, keys: Sequence[int], counts: Sequence[int], rows: int) -> None:
        """Note that ``rows`` tokens ran through ``layer`` and key i was chosen by ``counts[i]`` of them."""
        if rows == 0:
            return
        score = self._score
        if rows == 1:  # decoding one sequence: kept short
            weight = self._weight[layer] * self._growth
            self._total[layer] += weight
            for key in keys:
                score[key] += weight
        else:
            elapsed = min(sqrt(rows), self._half_life)
            weight = self._weight[layer] * 2.0 ** (elapsed / self._half_life)
            unit = weight * elapsed / rows
            self._total[layer] += weight * elapsed
            for key, count in zip(keys, counts, strict=True):
                score[key] += unit * count
        self._weight[layer] = weight
        if weight > _RESCALE:
            self._rescale(layer)
        self._note_lowest(layer)

    def _rescale(self, layer: int) -> None:
        factor = 1.0 / self._weight[layer]
        self._weight[layer] = 1.0
        self._total[layer] *= factor
        for key, owner in enumerate(self._layer_of):
            if owner == layer:
                self._score[key] *= factor
        heap = [(self._score[key], key) for _, key in self._heaps[layer]]
        heapify(heap)
        self._heaps[layer] = heap

    def _note_lowest(self, layer: int) -> None:
        """After a change of a layer's total or of the top of its heap."""
        heap = self._heaps[layer]
        self._lowest[layer] = heap[0][0] / self._total[layer] if heap else _EMPTY

    def probability(self, key: int) -> float:
        """Estimated probability that the next token of the key's layer uses it."""
        return self._score[key] / self._total[self._layer_of[key]]

    def heat(self) -> F32:
        """How much each key was used lately: a use n tokens of its layer ago counts ``2 ** (-n / half_life)``.

        For onlookers: any thread may ask, and sees a copy that may be a moment out of date.
        """
        weight = np.array(self._weight)[np.array(self._layer_of, np.intp)]
        heat: F32 = (np.array(self._score) / weight).astype(np.float32)
        return heat

    def free(self) -> int:
        """Slots holding nothing."""
        return len(self._free)

    def unused(self) -> int:
        """Slots whose bytes are on their way, or there and not used yet."""
        return self._new.count(1)

    def spare(self) -> int:
        """Slots that are free or can be made so."""
        return self.capacity - (len(self.pinned) - self.pinned.count(0))

    def pin(self, key: int) -> None:
        """Protect a resident key until it is released, by this user as by all others."""
        self.pinned[key] += 1

    def acquire(self, key: int, force: bool = False) -> int | None:
        """Give a slot to a key that is not resident, pinned; None if that would cost a more probable key.

        ``force`` evicts the least probable key even then; None then means that every slot is pinned.
        """
        if not self._free:
            victim = self._victim()
            if victim is None or not (force or self.probability(victim) < self.probability(key)):
                return None
            self._evict(victim)
        slot = self._free.pop()
        self.slot_of[key] = slot
        self.pinned[key] = self._new[key] = 1
        return slot

    def release(self, keys: Sequence[int]) -> None:
        """Unpin keys whose bytes were used, then evict the least probable beyond what may be kept."""
        pinned, new, in_heap, layer_of = self.pinned, self._new, self._in_heap, self._layer_of
        for key in keys:
            if new[key]:
                new[key] = 0
                self._kept += 1
            pinned[key] -= 1
            if not in_heap[key]:
                in_heap[key] = 1
                layer, score = layer_of[key], self._score[key]
                heappush(self._heaps[layer], (score, key))
                self._lowest[layer] = min(self._lowest[layer], score / self._total[layer])
        while self._kept > self.capacity - self.reserve:
            victim = self._victim()
            if victim is None:
                return
            self._evict(victim)

    def resize(self, slots: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Use the first so many slots, of those it was made with, as far as what is pinned allows.

        Returns:
            The slots given up, which hold nothing any more: the least probable keys went. And the moves, (from, to),
            that the bytes of others must make before, out of the last slots.
        """
        while self._retired and self.capacity < slots:
            self._free.append(self._retired.pop())
            self.capacity += 1
        if self.capacity <= slots:
            return [], []
        while len(self._free) < self.capacity - slots and (victim := self._victim()) is not None:
            self._evict(victim)
        low = [slot for slot in self._free if slot < slots]
        given_up = [slot for slot in self._free if slot >= slots]
        moves: list[tuple[int, int]] = []
        for key, slot in enumerate(self.slot_of):
            if slot >= slots and not self.pinned[key] and low:
                moves.append((slot, low.pop()))
                self.slot_of[key] = moves[-1][1]
                given_up.append(slot)
        given_up.sort(reverse=True)
        self._free = low
        self._retired += given_up
        self.capacity -= len(given_up)
        return given_up, moves

    def discard(self, key: int) -> None:
        """Free the slot of a key whose bytes did not arrive, whoever pins it."""
        self.pinned[key] = self._new[key] = 0
        self._free.append(self.slot_of[key])
        self.slot_of[key] = NO_SLOT

    def _victim(self) -> int | None:
        """The least probable evictable key."""
        lowest = self._lowest
        while (bound := min(lowest)) < _EMPTY:
            layer = lowest.index(bound)
            heap = self._heaps[layer]
            score, key = heap[0]
            if self.pinned[key] or self.slot_of[key] == NO_SLOT:
                heappop(heap)
                self._in_heap[key] = 0
            elif score != self._score[key]:
                heapreplace(heap, (self._score[key], key))
            else:
                return key
            self._note_lowest(layer)
        return None

    def _evict(self, key: int) -> None:
        """Drop the key at the top of its layer's heap."""
        layer = self._layer_of[key]
        heappop(self._heaps[layer])
        self._in_heap[key] = 0
        self._note_lowest(layer)
        self._kept -= 1
        self._free.append(self.slot_of[key])
        self.slot_of[key] = NO_SLOT


class LRU(LFRU):
    """Least recently used, for comparison; with ``reserve = capacity`` nothing stays once it was used."""

    def __init__(self, capacity: int, layer_of_key: Sequence[int], reserve: int = 0) -> None:
        super().__init__(capacity, layer_of_key, reserve)
        self._total = [1.0] * len(self._total)
        self._now = 0.0

    def record(self, layer: int, keys: Sequence[int], counts: Sequence[int], rows: int) -> None:
        """Note a use of ``keys``; how often does not matter."""
        self._now += 1.0
        for key in keys:
            self._score[key] = self._now

    def heat(self) -> F32:
        """As the base class, of each key's last use alone."""
        score = np.array(self._score)
        tokens = (self._now - score) / len(self._total)  # each layer of a step is noted once
        heat: F32 = np.where(score > 0.0, 2.0 ** (-tokens / self._half_life), 0.0).astype(np.float32)
        return heat


@dataclass(frozen=True, slots=True)
class Request:
    """What one layer of one step asked for."""

    layer: int
    keys: Sequence[int]  # distinct
    counts: Sequence[int]  # rows that chose each key
    rows: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Outcome of a replayed trace."""

    hits: int
    requests: int

    @property
    def hit_rate(self) -> float:
        """Share of requested keys that were resident."""
        return self.hits / self.requests if self.requests else 0.0


def make_policy(name: str, slots: int, layer_of_key: Sequence[int]) -> LFRU:
    """The policy of a store of that size, by its name in ``POLICIES``.

    ``lfru:64`` has another half-life (in tokens) than the store's.

    Raises:
        ConfigError: the name is unknown.
    """
    kind, _, half_life = name.partition(":")
    reserve = landing_slots(slots, len(layer_of_key))
    if name == "lru":
        return LRU(slots, layer_of_key, reserve)
    if name == "lfru":
        return LFRU(slots, layer_of_key, reserve)
    if kind == "lfru" and half_life.isascii() and half_life.isdecimal() and 0 < int(half_life[:9]) < 10**8:
        return LFRU(slots, layer_of_key, reserve, float(half_life))
    raise ConfigError(f"unknown policy {name!r}: choose from {', '.join(POLICIES)}, or a half-life as in lfru:64")


def serve(policy: LFRU, request: Request) -> int:
    """What the store does for one layer of one step if every read is instantaneous; returns the number of hits."""
    slot_of = policy.slot_of
    policy.record(request.layer, request.keys, request.counts, request.rows)
    held = [key for key in request.keys if slot_of[key] != NO_SLOT]
    hits = len(held)
    misses = [key for key in request.keys if slot_of[key] == NO_SLOT] if hits < len(request.keys) else []
    for key in held:
        policy.pin(key)
    for key in misses:
        if policy.acquire(key) is None:
            policy.release(held)
            held = []
            policy.acquire(key, force=True)
        held.append(key)
    policy.release(held)
    return hits


def simulate(policy: LFRU, trace: Sequence[Request]) -> Replay:
    """Replay a trace as the store would if every read were instantaneous."""
    hits = sum(serve(policy, request) for request in trace)
    return Replay(hits, sum(len(request.keys) for request in trace))


def belady(trace: Sequence[Request], slots: int) -> Replay:
    """The best any policy could do knowing the future (Belady 1966): keep what is needed soonest."""
    return Replay(sum(belady_hits(trace, slots)), sum(len(request.keys) for request in trace))


def belady_hits(trace: Sequence[Request], slots: int) -> list[int]:
    """Hits of each request under Belady's policy."""
    never = len(trace)
    later: dict[int, int] = {}
    next_uses: list[list[int]] = []
    for at in range(len(trace) - 1, -1, -1):
        next_uses.append([later.get(key, never) for key in trace[at].keys])
        later.update(dict.fromkeys(trace[at].keys, at))
    next_uses.reverse()

    hits: list[int] = []
    resident: dict[int, int] = {}  # key: next use
    heap: list[tuple[int, int]] = []  # (-next use, key), some stale
    for request, uses in zip(trace, next_uses, strict=True):
        hits.append(sum(key in resident for key in request.keys))
        for key, use in zip(request.keys, uses, strict=True):
            resident[key] = use
            heappush(heap, (-use, key))
        while len(resident) > slots:
            use, key = heappop(heap)
            if resident.get(key) == -use:
                del resident[key]
    return hits
