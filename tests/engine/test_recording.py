"""Recorded routing is what the router chose, with the steps and sequences it was chosen in."""

from __future__ import annotations

import numpy as np
import pytest
from text_models import load

from moestream.engine.recording import Recorder
from moestream.errors import RequestError
from moestream.experts.trace import replay

PROMPTS = [list(range(1, 11)), [5, 6, 7], [8]]


@pytest.fixture(scope="module")
def recorded(folder):
    """Three prompts in sweeps of 4, two at a time; what the router chose is noted beside the recorder."""
    with load(folder, max_batch=2, prefill_chunk=4) as llm:
        store = llm.runtime.store
        noted, stream = [], store.stream
        store.stream = lambda layer, ids: (noted.append((layer, ids.copy())), stream(layer, ids))[1]
        with Recorder(llm.runtime) as recorder:
            done = llm.generate(PROMPTS, max_tokens=4, temperature=0, ignore_eos=True)
            llm.logits([1, 2, 3])  # no sequence of the scheduler: not part of the trace
            during = len(noted) - len(llm.runtime.config.moe_layers)
        llm.generate([1, 2], max_tokens=2)  # after the recorder's end
        return llm.runtime, recorder.trace(), done, noted[:during]


def test_ids_are_the_routers(recorded):
    runtime, trace, _, noted = recorded
    assert trace.layers == runtime.config.moe_layers
    assert trace.experts == runtime.config.moe.experts
    for column, layer in enumerate(trace.layers):
        chosen = np.concatenate([ids for at, ids in noted if at == layer])
        np.testing.assert_array_equal(trace.ids[:, column], chosen)


def test_every_token_is_there_once_in_its_sequence(recorded):
    _, trace, done, _ = recorded
    starts = np.cumsum(trace.segments[:, 2]) - trace.segments[:, 2]
    for number, (prompt, completion) in enumerate(zip(PROMPTS, done, strict=True)):
        rows = [
            (int(token), int(s[3]))
            for s, start in zip(trace.segments, starts, strict=True)
            if s[1] == number
            for token in trace.tokens[start : start + s[2]]
        ]
        # The last token of a reply is chosen but never runs.
        assert [token for token, _ in rows] == [*prompt, *completion.token_ids[:-1]]
        assert [in_prompt for _, in_prompt in rows] == [1] * len(prompt) + [0] * 3


def test_sequences_of_one_step_share_it(recorded):
    _, trace, _, _ = recorded
    sizes = np.bincount(trace.segments[:, 0], trace.segments[:, 2])
    assert sizes.max() <= 4 + 2
    assert (np.bincount(trace.segments[:, 0]) == 2).any()


def test_a_replay_counts_the_hits_of_the_store(folder):
    with load(folder) as llm, Recorder(llm.runtime) as recorder:
        receipt = llm.generate(PROMPTS[0], max_tokens=12, temperature=0, ignore_eos=True).receipt
        slots = llm.runtime.store.arena.slots
        trace = recorder.trace()
    outcome = replay(trace, ["lfru"], [slots])[0]
    assert outcome.hit_rate == pytest.approx(receipt.hit_rate)


def test_a_step_that_fails_is_not_recorded(folder, monkeypatch):
    with load(folder) as llm, Recorder(llm.runtime) as recorder:
        llm.generate([1, 2], max_tokens=2, temperature=0, ignore_eos=True)
        steps = recorder.trace().steps
        ops = llm.runtime.model.ops
        monkeypatch.setattr(ops, "combine", lambda *_: (_ for _ in ()).throw(ValueError("broken")))
        with pytest.raises(RequestError, match="broken"):
            llm.generate([3, 4], max_tokens=2)
        monkeypatch.undo()
        llm.generate([5], max_tokens=1)
        trace = recorder.trace()
    assert trace.steps == steps + 1
    assert trace.tokens.tolist()[-1] == 5
