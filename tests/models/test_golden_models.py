"""Our models against ``transformers`` on tiny checkpoints of every architecture and storage form.

Shape letters: as in ``src/moestream/ops/base.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
from golden_models import GREEDY, PROMPTS, Golden, assert_close, run_chunked

from moestream.models.batch import Batch
from moestream.ops.base import Ops

CHUNKINGS = [(1, 1, 1, 63, 64, 17), (65, 81, 1), (128, 2, 17), (7, 30, 60, 40, 10)]


def test_prefill_matches_layer_by_layer(tiny: Golden, exact_ops: Ops) -> None:
    model = tiny.model(exact_ops)
    hidden: list[np.ndarray] = []
    model.observe = lambda layer, x: hidden.append(x[tiny.arrays["rows"]].copy())
    logits = model.forward(Batch.of([(tiny.ids(0), model.new_states())], all_logits=True))
    for layer, bound in enumerate(tiny.hidden_bound):
        assert_close(hidden[layer], tiny.arrays["hidden"][layer], bound, f"layer {layer}")
    assert_close(logits, tiny.logits(0), tiny.logits_bound, "logits")


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
def test_prefill_in_chunks_matches(tiny: Golden, exact_ops: Ops, chunks: tuple[int, ...]) -> None:
    logits = run_chunked(tiny.model(exact_ops), tiny.ids(0), chunks)
    assert_close(logits, tiny.logits(0), tiny.logits_bound, f"chunks {chunks}")


@pytest.mark.parametrize("prompt", [1, 2])
def test_token_by_token_matches(tiny: Golden, exact_ops: Ops, prompt: int) -> None:
    ids = tiny.ids(prompt)
    logits = run_chunked(tiny.model(exact_ops), ids, [1] * len(ids))
    assert_close(logits, tiny.logits(prompt), tiny.logits_bound, "token by token")


def test_unequal_sequences_decode_together(tiny: Golden, exact_ops: Ops) -> None:
    """Three prompts are read in one batch and continued greedily together, with a fourth joining half way."""
    model = tiny.model(exact_ops)
    states = [model.new_states() for _ in PROMPTS]
    ids = [tiny.ids(p) for p in PROMPTS]
    lengths = [len(i) - GREEDY for i in ids]
    logits = model.forward(Batch.of([(i[:n], s) for i, n, s in zip(ids, lengths, states, strict=True)]))
    late = model.new_states()
    for step in range(GREEDY):
        chosen = logits.argmax(axis=1)
        for p in PROMPTS:
            row = lengths[p] + step - 1
            assert_close(logits[p], tiny.logits(p)[row], tiny.logits_bound, f"prompt {p} step {step}")
            assert chosen[p] == ids[p][lengths[p] + step]
        chunks = [(chosen[p : p + 1], states[p]) for p in PROMPTS]
        if step == GREEDY // 2:
            chunks.insert(1, (ids[1][: lengths[1]], late))
        logits = model.forward(Batch.of(chunks))
        if step == GREEDY // 2:
            assert_close(logits[1], tiny.logits(1)[lengths[1] - 1], tiny.logits_bound, "late sequence")
            logits = np.delete(logits, 1, axis=0)


def test_choices_of_the_goldens_are_clear(tiny: Golden) -> None:
    """No expert and no token of the goldens is decided by less than the error bound."""
    assert tiny.arrays["margin"] > 2 * tiny.logits_bound
    assert tiny.arrays["gap"] > 2 * tiny.hidden_bound.max()
