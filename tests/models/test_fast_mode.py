"""The fast mode (int8 activations, float16 KV cache) stays within what its rounding can explain."""

from __future__ import annotations

import numpy as np
import pytest
from golden_models import Golden, run_chunked

from moestream.models.batch import Batch
from moestream.models.model import Model
from moestream.ops.base import F32, I32, Ops


class Routing:
    """Imposes the golden's experts on a pass over the given (prompt, first row, rows) pieces of a batch.

    A rounded activation may choose another expert where two are close, which no bound on rounding covers.
    """

    def __init__(self, tiny: Golden, model: Model) -> None:
        self.tiny = tiny
        self.order = {layer: i for i, layer in enumerate(model.config.moe_layers)}
        self.pieces: list[tuple[int, int, int]] = []
        model.router_override = self

    def __call__(self, layer: int, rows: int) -> I32:
        chosen = [
            self.tiny.arrays[f"router_{prompt}"][self.order[layer], start : start + count]
            for prompt, start, count in self.pieces
        ]
        ids = np.concatenate(chosen).astype(np.int32)
        assert len(ids) == rows
        return ids


def rms(x: F32) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize("chunks", [(147,), (65, 81, 1), (1,) * 40 + (64, 43)], ids=["whole", "chunks", "tokens"])
def test_rounding_error_is_bounded(tiny: Golden, fast_ops: Ops, chunks: tuple[int, ...]) -> None:
    model = tiny.model(fast_ops)
    routing = Routing(tiny, model)
    states, out, start = model.new_states(), [], 0
    for count in chunks:
        routing.pieces = [(0, start, count)]
        out.append(model.forward(Batch.of([(tiny.ids(0)[start : start + count], states)], all_logits=True)))
        start += count
    error = rms(np.concatenate(out) - tiny.logits(0))
    assert error <= tiny.fast_bound()


def test_a_batch_is_as_good_as_each_sequence_alone(tiny: Golden, fast_ops: Ops) -> None:
    model = tiny.model(fast_ops)
    routing = Routing(tiny, model)
    states = [model.new_states() for _ in range(3)]
    routing.pieces = [(0, 0, 50), (1, 0, 1), (2, 0, 7)]
    parts = [(tiny.ids(p)[start : start + count], states[p]) for p, start, count in routing.pieces]
    together = model.forward(Batch.of(parts, all_logits=True))
    expected = np.concatenate([tiny.logits(p)[start : start + count] for p, start, count in routing.pieces])
    assert rms(together - expected) <= tiny.fast_bound()


def test_free_routing_still_finds_the_words(tiny: Golden, fast_ops: Ops) -> None:
    """With its own routing the fast mode agrees on most next tokens; random logits would on 1 in 160."""
    logits = run_chunked(tiny.model(fast_ops), tiny.ids(0), (100, 47))
    assert np.mean(logits.argmax(axis=1) == tiny.logits(0).argmax(axis=1)) > 0.8
