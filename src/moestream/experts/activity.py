"""What an onlooker sees of a store: which experts are in memory, being read, and in use lately."""

from __future__ import annotations

import numpy as np

from moestream.experts.policy import NO_SLOT
from moestream.experts.reader import U8
from moestream.experts.store import ExpertStore

HEAT = 63
"""Bits that hold the heat, from 0 to this: the logarithm of the uses lately, an expert of every token at the top."""
RESIDENT = 64
READING = 128
_ALWAYS = 23.6  # uses lately of an expert that every token takes, with a half-life of 16 tokens


def cells(store: ExpertStore) -> U8:
    """One byte for each expert of each layer in turn: ``READING`` and ``RESIDENT`` bits, and its heat.

    Any thread may ask at any time. Nothing is kept for it while the store works: the engine's thread only waits for
    the copies, about 3 ms of a model of 60 x 512 experts. What is seen may be a moment out of date.
    """
    reading = store.under_way()  # first: what lands meanwhile still counts as being read
    slots = np.array(store.policy.slot_of, np.int32)
    heat = np.log1p(store.policy.heat()) * (HEAT / np.log1p(_ALWAYS))
    seen: U8 = np.minimum(np.round(heat), HEAT).astype(np.uint8)
    seen[slots != NO_SLOT] |= RESIDENT
    seen[reading] |= READING
    seen[reading] &= ~np.uint8(RESIDENT)  # it has a slot, whose bytes are not there yet
    return seen
