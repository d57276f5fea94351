"""The prefix cache: what several prompts begin with is computed once.

Snapshots of states are kept under a byte budget, least recently used out first, and those dropped go to a folder if
there is one. Where a prompt is worth a snapshot: after its last message (the next turn of the conversation begins with
it), after its first message (other conversations share the system prompt), and where it leaves a prompt seen before.
Models without delta-net layers can be cut back to any length, so for them every snapshot serves all its prefixes.

Shape letters: n tokens of a prefix.
"""

from __future__ import annotations

import itertools
from collections import Counter, abc
from dataclasses import dataclass

import numpy as np

from moestream.engine.prefix_files import PrefixFiles
from moestream.models.snapshots import Snapshot, start_from, take
from moestream.models.states import SequenceStates, copy_of
from moestream.ops.base import I32, DeltaState

SHORTEST = 64
"""Tokens below which a prefix is not worth a snapshot."""


@dataclass(slots=True, eq=False)
class _Entry:
    tokens: I32  # [n]
    snapshot: Snapshot | None
    """None: only in the folder."""
    used: int


class PrefixCache:
    """Snapshots of prefixes. Not thread-safe.

    Attributes:
        nbytes: Held in memory now, never more than the budget.
    """

    def __init__(
        self,
        budget: int,
        recurrent: bool,
        message_ends: abc.Set[int] = frozenset(),
        files: PrefixFiles | None = None,
    ) -> None:
        """Start with what the folder holds.

        Args:
            budget: Bytes of snapshots in memory.
            recurrent: Whether the model has delta-net layers, whose states cannot be cut back.
            message_ends: Tokens that end a message of a conversation.
            files: Where snapshots outlive the process.
        """
        self.nbytes = 0
        self._budget = budget
        self._recurrent = recurrent
        self._message_ends = np.array(sorted(message_ends), np.int32)
        self._files = files
        self._clock = itertools.count()
        self._pages: Counter[int] = Counter()  # snapshots that share a page, by its id
        self._entries = [_Entry(t, None, next(self._clock)) for t in (files.tokens() if files is not None else ())]

    def start(self, prompt: abc.Sequence[int], states: SequenceStates) -> int:
        """Bring the empty states of a new sequence as far as a snapshot goes, and mark where more are wanted.

        Returns:
            Tokens of the prompt that are in the states; at least its last one is not.
        """
        ids = np.asarray(prompt, np.int32)
        shared = [(_common(entry.tokens, ids), entry) for entry in self._entries]
        done = self._restore(shared, len(ids) - 1, states)
        if self._recurrent:
            branch = max((length for length, _ in shared), default=0)
            states.marks = tuple(sorted(m for m in self._marks(ids, branch) if m >= max(done + 1, SHORTEST)))
        return done

    def kept(self, prompt: abc.Sequence[int], most: int) -> int:
        """How many of a prompt's first tokens, up to ``most``, are kept once it has been read and are not yet."""
        ids = np.asarray(prompt, np.int32)
        length = min(most, len(ids))
        if self._recurrent:
            length = max((m for m in self._marks(ids, 0) if SHORTEST <= m <= most), default=0)
        shared = ((_common(entry.tokens, ids[:length]), len(entry.tokens)) for entry in self._entries)
        return length - max((common for common, own in shared if common == own or not self._recurrent), default=0)

    def keep(self, tokens: abc.Sequence[int], states: SequenceStates) -> None:
        """Take the snapshots that a prompt, now read to its end, was marked for."""
        for length, deltas in sorted(states.marked.items()):
            self._add(np.asarray(tokens[:length], np.int32), states, tuple(deltas))
        states.marks, states.marked = (), {}
        if not self._recurrent:
            self.keep_end(tokens, states)

    def keep_end(self, tokens: abc.Sequence[int], states: SequenceStates) -> None:
        """Take a snapshot of a sequence as it is.

        Args:
            tokens: Prompt and reply; the first ``states.length`` of them are in the states.
            states: Of a sequence between two steps.
        """
        if states.length >= SHORTEST:
            now = tuple(copy_of(s) for s in states.delta_states())
            self._add(np.asarray(tokens[: states.length], np.int32), states, now)

    def close(self) -> None:
        """Write what only memory holds into the folder, the most recently used last."""
        for entry in sorted(self._entries, key=lambda e: e.used):
            if self._files is not None and entry.snapshot is not None:
                self._files.save(entry.tokens, entry.snapshot)
        self._entries.clear()

    def _marks(self, ids: I32, branch: int) -> set[int]:
        """Lengths after which another prompt may part from this one."""
        ends = np.flatnonzero(np.isin(ids, self._message_ends)) + 1
        last = len(ids) - 1
        marks = {int(ends[0]), int(ends[-1])} if len(ends) else {last}
        return {m for m in marks | {branch} if m <= last}

    def _restore(self, shared: list[tuple[int, _Entry]], most: int, states: SequenceStates) -> int:
        """Start from the snapshot that goes furthest; what cannot be read is forgotten."""
        for length, entry in sorted(shared, key=lambda pair: -pair[0]):
            usable = min(length, most)
            if usable < SHORTEST or (self._recurrent and usable < len(entry.tokens)):
                continue
            snapshot = entry.snapshot
            if snapshot is None:
                assert self._files is not None
                snapshot = self._files.load(entry.tokens)
                if snapshot is None:
                    self._entries.remove(entry)
                    continue
                self._hold(entry, snapshot)
            start_from(states, snapshot, usable)
            entry.used = next(self._clock)
            self._shrink()
            return usable
        return 0

    def _add(self, tokens: I32, states: SequenceStates, deltas: tuple[DeltaState, ...]) -> None:
        for entry in self._entries.copy():
            common = _common(entry.tokens, tokens)
            if common == len(tokens) and (common == len(entry.tokens) or not self._recurrent):
                entry.used = next(self._clock)  # it serves already
                return
            if common == len(entry.tokens) and not self._recurrent:
                self._forget(entry)  # the new one serves for it
        entry = _Entry(tokens, None, next(self._clock))
        self._entries.append(entry)
        self._hold(entry, take(states, len(tokens), deltas))
        self._shrink()

    def _hold(self, entry: _Entry, snapshot: Snapshot) -> None:
        entry.snapshot = snapshot
        self.nbytes += snapshot.deltas_nbytes
        for page in snapshot.pages:
            self._pages[id(page)] += 1
            if self._pages[id(page)] == 1:
                self.nbytes += page.nbytes

    def _shrink(self) -> None:
        """Drop the least recently used from memory until the budget holds."""
        while self.nbytes > self._budget:
            entry = min((e for e in self._entries if e.snapshot is not None), key=lambda e: e.used)
            assert entry.snapshot is not None
            if self._files is not None and self._files.save(entry.tokens, entry.snapshot):
                self._drop(entry)
            else:
                self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        self._drop(entry)
        self._entries.remove(entry)

    def _drop(self, entry: _Entry) -> None:
        if entry.snapshot is None:
            return
        self.nbytes -= entry.snapshot.deltas_nbytes
        for page in entry.snapshot.pages:
            self._pages[id(page)] -= 1
            if not self._pages[id(page)]:
                del self._pages[id(page)]
                self.nbytes -= page.nbytes
        entry.snapshot = None


def _common(a: I32, b: I32) -> int:
    """Tokens that two sequences begin with alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
