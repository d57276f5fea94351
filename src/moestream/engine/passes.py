"""Forward passes of the engine: which rows they hold, whose logits are used, and what they are for.

Shape letters: N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moestream.engine.receipt import IoCounters
from moestream.engine.sampling import token_logprobs
from moestream.engine.sequence import Sequence
from moestream.models.batch import Batch
from moestream.models.states import SequenceStates
from moestream.ops.base import F32

PromptProgress = Callable[[int, int], None]
"""Called with (done, total), both in layers x prompt tokens, after each layer of a step that reads prompts."""


class EngineModel(Protocol):
    """What the engine needs of a model."""

    def new_states(self, limit: int | None = None) -> SequenceStates:
        """States of a sequence of up to ``limit`` tokens."""

    def forward(self, batch: Batch) -> F32:
        """Logits [N, V]; advances the states and fills ``batch.failures``."""

    def layers(self, batch: Batch) -> Generator[str, bool | None, F32]:
        """The same piece by piece; yields the name of the next one, and rests on ``send(True)``: see ``Model``."""


@dataclass(slots=True, eq=False)
class Pass:
    """A forward pass, possibly under way: at rest between two of its pieces."""

    chunks: list[tuple[Sequence, int]]
    """Each sequence with the number of its next tokens."""
    batch: Batch
    wanted: list[tuple[Sequence, int]]
    """The sequences that use its logits, in order, with the number of their rows."""
    layers: Generator[str, bool | None, F32]
    io: IoCounters = field(default_factory=IoCounters)
    seconds: float = 0.0
    """That it has run so far."""
    upcoming: str = ""
    """The name of its next piece."""
    took: dict[str, float] = field(default_factory=dict)
    """Seconds of the latest piece of each name."""

    @property
    def sequences(self) -> list[Sequence]:
        """All whose tokens it computes."""
        return [sequence for sequence, _ in self.chunks]

    @property
    def prompt_tokens(self) -> int:
        """How many of its rows read prompts."""
        return sum(count for sequence, count in self.chunks if not sequence.decoding)

    @property
    def expected(self) -> float:
        """Seconds that the next piece will probably take."""
        return self.took.get(self.upcoming, max(self.took.values(), default=0.0))

    @property
    def pausable(self) -> bool:
        """Whether nobody waits for its next token in it."""
        return not any(sequence.decoding for sequence, _ in self.chunks)


def batch_of(chunks: list[tuple[Sequence, int]]) -> tuple[Batch, list[tuple[Sequence, int]]]:
    """The batch of a step, and the sequences that use its logits, in order, with the number of their rows."""
    parts, wanted, row = [], [], 0
    rows: list[int] = []
    for sequence, count in chunks:
        assert sequence.states is not None
        parts.append((sequence.upcoming(count), sequence.states))
        own = range(row, row + count)
        if not sequence.scored or sequence.decoding:
            ready = count >= sequence.left
            own = own[-1:] if ready else own[:0]
        rows += own
        wanted.append((sequence, len(own)))
        row += count
    batch = Batch.of(parts)
    batch.logits_rows = np.array(rows, np.int32)
    return batch, wanted


def score_prompt(sequence: Sequence, logits: F32) -> None:
    """Log probabilities of the prompt's tokens, from the logits [N, V] after those just before them."""
    top = sequence.params.prompt_logprobs
    if top is not None and sequence.scored:
        first = sequence.computed - len(logits) + 1
        for row, token in zip(logits, sequence.prompt[first : first + len(logits)], strict=False):
            sequence.prompt_logprobs.append(token_logprobs(row, token, top))


def prompt_progress(chunks: list[tuple[Sequence, int]], report: PromptProgress) -> Callable[[int, int], None] | None:
    """What a layer's end means for the prompts of a step; None for a step without any."""
    reading = [(sequence, count) for sequence, count in chunks if not sequence.decoding]
    before = sum(sequence.computed for sequence, _ in reading)
    now = sum(count for _, count in reading)
    total = sum(len(sequence.prompt) + sequence.replay for sequence, _ in reading)
    return (lambda done, layers: report(layers * before + done * now, layers * total)) if reading else None
