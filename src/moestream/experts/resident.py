"""Layers whose experts are in memory for good: no read, no pin, no victim.

Shape letters: T rows, k experts per row, n distinct experts, P parts, K experts of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moestream.errors import ReadError
from moestream.experts.arena import Arena
from moestream.experts.layer_plan import LayerPlan
from moestream.ops.base import I32, Wave


def group_pairs(ids: I32, layer: int, plan: LayerPlan) -> tuple[I32, I32, I32]:
    """Group routed pairs by expert: ids [T, k] -> experts [n], starts [n + 1], pairs [T * k], as in ``Wave``.

    Experts of one row stay in its order, others are sorted.

    Raises:
        ValueError: an id is out of range.
    """
    flat = ids.reshape(-1)
    if len(ids) == 1 and len(set(chosen := flat.tolist())) == len(chosen):  # decoding: kept short
        lowest, highest = min(chosen, default=0), max(chosen, default=0)
        experts, starts = flat, np.arange(len(chosen) + 1, dtype=np.int32)
        pairs = starts[:-1]
    else:
        pairs = flat.argsort(kind="stable").astype(np.int32)
        grouped = flat[pairs]
        lowest, highest = (grouped[0], grouped[-1]) if grouped.size else (0, 0)
        edges = np.flatnonzero(grouped[1:] != grouped[:-1]) + 1
        starts = np.array([0, *edges.tolist(), grouped.size] if grouped.size else [0], np.int32)
        experts = grouped[starts[:-1]]
    _check(layer, plan, lowest, highest)
    return experts, starts, pairs


def _check(layer: int, plan: LayerPlan, lowest: int, highest: int) -> None:
    if not 0 <= lowest <= highest < plan.num_experts:
        raise ValueError(f"layer {layer}: expert ids must lie in 0..{plan.num_experts - 1}")


def uses(starts: I32, rows: int) -> list[int]:
    """How often the rows chose each expert; starts [n + 1]."""
    if rows == 1 and starts[-1] == len(starts) - 1:  # decoding: kept short
        return [1] * (len(starts) - 1)
    counts: list[int] = np.diff(starts).tolist()
    return counts


class ResidentStream:
    """One wave of experts that are in memory for good.

    Attributes:
        failures: Nothing was read, nothing failed.
    """

    def __init__(self, wave: Wave) -> None:
        self.failures: list[tuple[I32, ReadError]] = []
        self._waves = [wave]

    def __iter__(self) -> Iterator[Wave]:
        return self

    def __next__(self) -> Wave:
        """The wave, once."""
        if not self._waves:
            raise StopIteration
        return self._waves.pop()

    def close(self) -> None:
        """Drop the wave if nobody took it."""
        self._waves.clear()


class Residents:
    """Where the experts of a model lie that fits into the arena, from where nothing is ever evicted.

    Pinning and releasing them would cost as long as reading 1 MB of weights, and so would checking each of them again
    for every token.
    """

    def __init__(self, arena: Arena, plans: list[LayerPlan | None]) -> None:
        self._arena = arena
        self._plan_of = [plan for plan in plans if plan is not None for _ in range(plan.num_experts)]  # by key
        self._offsets = {  # by layer [E, P]; negative: not in memory
            plan.layer: np.full(plan.part_offsets.shape, -1, np.int64) for plan in plans if plan is not None
        }
        self._missing = {plan.layer: plan.num_experts for plan in plans if plan is not None}
        self._one_row: dict[int, tuple[I32, I32]] = {}  # starts and pairs of a single row, by k

    def landed(self, key: int, slot: int) -> None:
        """An expert's bytes are in a slot, to stay."""
        plan = self._plan_of[key]
        offsets = self._offsets[plan.layer][key - plan.first_key]
        self._missing[plan.layer] -= 1 if offsets[0] < 0 else 0
        offsets[:] = plan.part_offsets[key - plan.first_key] + slot * self._arena.slot_nbytes

    def clear(self) -> None:
        """Nothing is in memory any more."""
        for layer, offsets in self._offsets.items():
            offsets.fill(-1)
            self._missing[layer] = len(offsets)

    def wave(self, layer: int, plan: LayerPlan, ids: I32) -> Wave | None:
        """What ids [T, k] need of a layer, or None if some of it has not landed.

        Raises:
            ValueError: an id is out of range.
        """
        offsets, memory = self._offsets[layer], self._arena.memory
        if len(ids) == 1 and not self._missing[layer]:  # decoding: kept short
            experts, chosen = ids[0], ids[0].tolist()
            _check(layer, plan, min(chosen), max(chosen))
            starts, pairs = self._row(len(chosen))
            return Wave(layer, plan.layout, experts, memory, offsets, starts, pairs, experts)
        experts, starts, pairs = group_pairs(ids, layer, plan)
        if self._missing[layer] and (offsets[experts, 0] < 0).any():
            return None
        return Wave(layer, plan.layout, experts, memory, offsets, starts, pairs, experts)

    def _row(self, k: int) -> tuple[I32, I32]:
        found = self._one_row.get(k)
        if found is None:
            starts = np.arange(k + 1, dtype=np.int32)
            found = self._one_row[k] = starts, starts[:-1]
        return found
