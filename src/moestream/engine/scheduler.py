"""Who gets a place in the batch, and how many tokens of each sequence run in the next step."""

from __future__ import annotations

from collections import Counter, abc
from collections.abc import Callable

from moestream.engine.sequence import Sequence
from moestream.engine.state_budget import StateBudget

SCORED_ROWS = 128
"""Prompt tokens of a step whose log probabilities are wanted: their logits are 4 bytes x vocabulary each."""
WORTH_WAITING = 256
"""Tokens that two prompts must begin with alike for one to wait until the other has read them."""
Kept = Callable[[abc.Sequence[int], int], int]
"""Of a prompt's first tokens, up to a bound, how many are kept once it has been read and are not yet."""
PATIENCE = 16
"""After so many later ones were served before it a sequence goes first, whatever its priority: nobody starves."""


class Scheduler:
    """Shares out places, memory for states and the prompt tokens of a step.

    At most ``max_batch`` sequences hold states, whose bytes the budget bounds. A place goes to the lowest priority
    number, then to the client with the fewest places, then to whoever came first. The prompt tokens of a step are
    divided evenly for prompts that end with their share; what they leave goes to the first of the long ones, so that a
    short question does not wait until an agent's long prompt has been read.
    """

    def __init__(self, max_batch: int, budget: StateBudget) -> None:
        self._max_batch = max_batch
        self._budget = budget
        self._waiting: list[Sequence] = []  # in order of arrival
        self._running: list[Sequence] = []  # in order of admission

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences without a place."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences with a place, some of which may still read their prompt."""
        return tuple(self._running)

    def add(self, sequence: Sequence, kept: Kept | None = None) -> None:
        """Queue a sequence; behind one that will sooner read the same prompt or a good deal of it, if there is one.

        Args:
            sequence: Without states.
            kept: What reading a prompt adds to what is kept for others that begin alike.
        """
        if sequence.params.prompt_logprobs is None:
            ahead = self._in_turn((*self._waiting, sequence))
            others = (s for s in (*self._running, *ahead[: ahead.index(sequence)]) if _can_lead(s))
            sequence.leader = next((s for s in others if _spares(s, sequence, kept)), None)
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished sequence, wherever it is; what it has reserved is not released by this."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def admit(self) -> list[Sequence]:
        """Give places to waiting sequences; the caller gives them states."""
        admitted = []
        while (sequence := self._next()) is not None:
            self._take_place(sequence)
            admitted.append(sequence)
        return admitted

    def admit_followers(self, leader: Sequence) -> list[Sequence]:
        """Give places to those that can start from a sequence that has read its prompt; the others queue again."""
        admitted = []
        for sequence in [s for s in self._waiting if s.leader is leader]:
            sequence.leader = None
            if sequence.prompt == leader.prompt and self._has_place(sequence) and self._budget.take(sequence):
                self._take_place(sequence)
                admitted.append(sequence)
        return admitted

    def schedule(self, room: int, apart: abc.Collection[Sequence] = ()) -> list[tuple[Sequence, int]]:
        """Sequences of the next step with the number of their next tokens.

        Args:
            room: Tokens of prompts, besides one of every decoding sequence.
            apart: Sequences that are left alone.
        """
        running = [s for s in self._running if s not in apart]
        chosen = [(s, 1) for s in running if s.decoding]
        return chosen + self._shares(sorted((s for s in running if not s.decoding), key=_order), room)

    def make_room(self, decoding: abc.Sequence[Sequence], apart: abc.Collection[Sequence] = ()) -> list[Sequence]:
        """Reserve the next token's memory of decoding sequences, in the order of their rights.

        Returns:
            Those that had to give up their place, last in that order first; they wait again. The first in order never
            does, so it always ends.
        """
        stopped: list[Sequence] = []
        for sequence in sorted(decoding, key=_order):
            while sequence not in stopped and not self._budget.grow(sequence):
                victim = max((s for s in self._running if s not in apart), key=_order)
                self._running.remove(victim)
                self._budget.release(victim)
                self._waiting.insert(0, victim)
                stopped.append(victim)
        return stopped

    def _shares(self, reading: list[Sequence], room: int) -> list[tuple[Sequence, int]]:
        if room <= 0 or not reading:
            return []
        even = max(1, room // len(reading))
        shares: dict[Sequence, int] = {}
        short = [s for s in reading if _most(s, room) <= even]
        for s in (*short, *(s for s in reading if s not in short)):
            if room > 0:
                shares[s] = _most(s, room)
                room -= shares[s]
        _overtake(reading, shares)
        return [(s, shares[s]) for s in reading if s in shares]

    def _next(self) -> Sequence | None:
        """The waiting sequence whose turn it is, its memory reserved; None if there is none that could start."""
        for s in self._in_turn(s for s in self._waiting if s.leader is None or not _can_lead(s.leader)):
            if not self._has_place(s):
                continue
            if self._budget.take(s):
                _overtake(self._waiting, [s])
                return s
            if s.overtaken >= PATIENCE:
                return None  # it waits for memory that the others would take
        return None

    def _in_turn(self, sequences: abc.Iterable[Sequence]) -> list[Sequence]:
        """Sequences in the order in which they are to get a place."""
        places = Counter(s.caller.client for s in self._running)
        return sorted(sequences, key=lambda s: (_order(s)[:2], places[s.caller.client], s.id))

    def _has_place(self, sequence: Sequence) -> bool:
        """Whether a place is free for it; the last one is kept from what can wait."""
        kept = sequence.caller.priority > 0 and self._max_batch > 1 and sequence.overtaken < PATIENCE
        return len(self._running) < self._max_batch - kept

    def _take_place(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        sequence.overtaken = 0
        sequence.leader = None
        self._running.append(sequence)


def _spares(leader: Sequence, sequence: Sequence, kept: Kept | None) -> bool:
    """Whether waiting for the leader's prompt costs less than reading one's own."""
    if leader.prompt == sequence.prompt:
        return True
    if kept is None or leader.prompt[:WORTH_WAITING] != sequence.prompt[:WORTH_WAITING]:
        return False
    pairs = enumerate(zip(leader.prompt, sequence.prompt, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(leader.prompt), len(sequence.prompt)))
    spared = kept(leader.prompt, common)
    return spared >= WORTH_WAITING and 2 * spared >= max(len(leader.prompt), len(sequence.prompt))


def _can_lead(sequence: Sequence) -> bool:
    """Whether another may wait for it to read their prompt."""
    alone = sequence.leader is None and sequence.params.prompt_logprobs is None and not sequence.replay
    return alone and not sequence.finished and not sequence.decoding


def _order(sequence: Sequence) -> tuple[bool, int, int]:
    """Sorts by right: those overtaken too often, then by priority and arrival."""
    return sequence.overtaken < PATIENCE, sequence.caller.priority, sequence.id


def _overtake(waiting: abc.Iterable[Sequence], served: abc.Collection[Sequence]) -> None:
    """Count for those not served that later ones were."""
    last = max((s.id for s in served), default=-1)
    for s in waiting:
        if s not in served and s.id < last:
            s.overtaken += 1
        elif s in served:
            s.overtaken = 0


def _most(sequence: Sequence, room: int) -> int:
    """Prompt tokens of a sequence in a step that has room for so many."""
    return min(min(room, SCORED_ROWS) if sequence.scored else room, sequence.left)
