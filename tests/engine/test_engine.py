"""Scheduling, isolation of failures and accounting, on a model whose next token is a hash of all tokens before it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestream.engine.engine import Engine
from moestream.engine.receipt import IoCounters, Receipt, Setup
from moestream.engine.sampling import SamplingParams
from moestream.errors import MoestreamError, NonFiniteLogitsError, ReadError, RequestError

VOCAB = 50
GREEDY = SamplingParams(temperature=0, max_tokens=6)


class States:
    """All that a hash needs to remember."""

    def __init__(self, limit):
        self.limit, self.length, self.hash = limit, 0, 7

    def copy_from(self, other):
        assert self.length == 0
        self.length, self.hash = other.length, other.hash


class HashModel:
    """Deterministic, and strict about what a step may contain."""

    def __init__(self, chunk=10**9):
        self.steps, self.io, self.chunk = [], IoCounters(), chunk
        self.before = lambda batch: None

    def new_states(self, limit=None):
        return States(limit)

    def layers(self, batch):
        if (yield "layer"):
            yield "layer"
        return self.forward(batch)

    def forward(self, batch):
        self.before(batch)
        self.steps.append([s.length for s in batch.segments])
        self.io += IoCounters(bytes_read=100.0 * len(batch.ids), hits=1, misses=3, busy_seconds=1, stall_seconds=0.25)
        scores = np.zeros((len(batch.ids), VOCAB), np.float32)
        for s in batch.segments:
            for row in range(s.start, s.start + s.length):
                assert batch.positions[row] == s.states.length < s.states.limit
                s.states.hash = (s.states.hash * 31 + int(batch.ids[row]) + 1) % 1000003
                s.states.length += 1
                scores[row] = np.random.default_rng(s.states.hash).standard_normal(VOCAB)
        return scores[batch.logits_rows]


def make(model=None, **kwargs):
    model = model or HashModel()
    kwargs = {"vocab_size": VOCAB, "context": 64, "counters": lambda: model.io} | kwargs
    return Engine(model, **kwargs), model


def drain(engine):
    events = []
    while not engine.idle:
        events += engine.step()
    assert engine.step() == []
    return events


def alone(prompt, params, **kwargs):
    engine, _ = make(**kwargs)
    sequence = engine.add(prompt, params)
    drain(engine)
    return sequence.tokens


REQUEST = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1.0]),
        top_k=st.sampled_from([0, 5]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        seed=st.integers(0, 9),
        max_tokens=st.integers(1, 12),
    ),
)


@given(
    requests=st.lists(REQUEST, min_size=1, max_size=6),
    max_batch=st.integers(1, 4),
    chunk=st.integers(1, 16),
    delays=st.lists(st.integers(0, 5), min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_any_batch_equals_each_request_alone(requests, max_batch, chunk, delays):
    engine, model = make(max_batch=max_batch, prefill_chunk=chunk)
    sequences = []
    for (prompt, params), delay in zip(requests, delays, strict=False):
        sequences.append(engine.add(prompt, params))
        for _ in range(delay):
            engine.step()
    drain(engine)
    for sequence, (prompt, params) in zip(sequences, requests, strict=True):
        assert sequence.tokens == alone(prompt, params)
        assert sequence.finish_reason == "length"
        assert sequence.states is None
    assert max(len(step) for step in model.steps) <= max_batch
    assert max(sum(step) for step in model.steps) <= chunk + max_batch


def test_long_prompt_passes_in_chunks_between_decodes():
    engine, model = make(max_batch=4, prefill_chunk=5)
    first = engine.add([1], SamplingParams(temperature=0, max_tokens=20))
    engine.step()
    second = engine.add(list(range(12)), GREEDY)
    for _ in range(3):
        before = len(first.tokens)
        engine.step()
        assert len(first.tokens) == before + 1
    assert model.steps == [[1], [1, 5], [1, 5], [1, 2]]
    assert len(second.tokens) == 1


def test_short_prompts_share_a_sweep_and_states_stay_bounded():
    engine, model = make(max_batch=3, prefill_chunk=10)
    for first in range(4):
        engine.add([first, 1, 2, 3], GREEDY)
    engine.step()
    engine.step()
    engine.step()
    assert model.steps[:3] == [[4, 4, 2], [1, 1, 2], [1, 1, 1]]
    drain(engine)
    assert sum(map(sum, model.steps)) == 4 * (4 + 5)


def test_end_tokens_stop_and_can_be_ignored():
    tokens = alone([3, 4], GREEDY)
    for params, eos, expected in (
        (GREEDY, {tokens[2]}, tokens[:3]),
        (SamplingParams(temperature=0, max_tokens=6, stop_token_ids=(tokens[1],)), set(), tokens[:2]),
        (SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), {tokens[2]}, tokens),
    ):
        engine, _ = make(eos_ids=eos)
        sequence = engine.add([3, 4], params)
        drain(engine)
        assert sequence.tokens == expected
        assert sequence.finish_reason == ("stop" if len(expected) < 6 else "length")


def test_context_bounds_prompt_and_reply():
    engine, _ = make(context=10)
    with pytest.raises(RequestError, match="has 10 tokens, but the context of 10 tokens holds 9"):
        engine.add([1] * 10, GREEDY)
    sequence = engine.add([1] * 8, SamplingParams(max_tokens=None))
    drain(engine)
    assert (len(sequence.tokens), sequence.finish_reason) == (2, "length")


@pytest.mark.parametrize("prompt", [[], [[1, 2]], [[1], [2, 3]], ["a"], [1.5], [VOCAB], [-1], "text"])
def test_malformed_prompts_are_refused(prompt):
    engine, _ = make()
    with pytest.raises(RequestError):
        engine.add(prompt, GREEDY)
    assert engine.idle


def test_abort_while_waiting_reading_and_decoding():
    engine, _ = make(max_batch=2, prefill_chunk=4)
    decoding, reading = engine.add([1], GREEDY), engine.add([2] * 9, GREEDY)
    waiting, kept = engine.add([3], GREEDY), engine.add([4], GREEDY)
    engine.step()
    for sequence in (decoding, reading, waiting):
        engine.abort(sequence)
        engine.abort(sequence, "stop")  # no effect any more
        assert sequence.finish_reason == "cancelled"
    drain(engine)
    assert len(decoding.tokens) == 1
    assert reading.tokens == waiting.tokens == []
    assert kept.tokens == alone([4], GREEDY)


def test_unreadable_expert_ends_only_its_request():
    engine, model = make(prefill_chunk=6)
    prompts = [[1, 2], [3, 4, 5, 6, 7, 8, 9], [10]]

    def fail(batch):  # a row of the second prompt's first chunk, and a row of the third while decoding
        if len(model.steps) == 0:
            batch.failures.append((4, ReadError("experts/layer-03.safetensors at 4096: Input/output error")))
        if len(model.steps) == 3:
            batch.failures.append((1, ReadError("short read")))

    model.before = fail
    first, second, third = (engine.add(p, GREEDY) for p in prompts)
    events = drain(engine)
    assert first.tokens == alone(prompts[0], GREEDY)
    assert (second.finish_reason, second.tokens) == ("error", [])
    assert isinstance(second.error, ReadError)
    assert "Input/output error" in str(second.error)
    assert third.finish_reason == "error"
    assert third.tokens == alone(prompts[2], GREEDY)[: len(third.tokens)] != []
    assert [e.token for e in events if e.sequence is second] == [None]


def test_nan_logits_end_only_their_request():
    engine, model = make()
    forward = model.forward

    def poisoned(batch):
        logits = forward(batch)
        if len(model.steps) == 3:
            logits[0, 17] = np.nan
        return logits

    model.forward = poisoned
    bad, good = engine.add([1, 2], GREEDY), engine.add([3], GREEDY)
    drain(engine)
    assert isinstance(bad.error, NonFiniteLogitsError)
    assert len(bad.tokens) == 2
    assert good.tokens == alone([3], GREEDY)


@pytest.mark.parametrize("error", [ValueError("boom"), MemoryError("no room"), ReadError("gone")])
def test_failed_step_ends_its_requests_and_nothing_else(error):
    engine, model = make(max_batch=2)

    def fail(batch):
        if len(model.steps) == 2:
            model.before = lambda batch: None
            raise error

    model.before = fail
    running = [engine.add([i], GREEDY) for i in (1, 2)]
    waiting = engine.add([3], GREEDY)
    drain(engine)
    for sequence in running:
        assert sequence.finish_reason == "error"
        assert isinstance(sequence.error, MoestreamError)
        assert str(error) in str(sequence.error)
        assert sequence.states is None
    assert waiting.tokens == alone([3], GREEDY)


@pytest.mark.parametrize("where", ["forward", "sampling"])
def test_interrupt_cancels_the_step_and_leaves_the_engine_usable(where):
    engine, model = make()
    first, second, third = (engine.add([i], GREEDY) for i in range(3))
    engine.step()

    def interrupt(*_):
        raise KeyboardInterrupt

    if where == "forward":
        model.before = interrupt
    else:
        second.sampler.sample = interrupt  # the first has its token already
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [s.finish_reason for s in (first, second, third)] == ["cancelled"] * 3
    assert engine.idle
    model.before = lambda batch: None
    again = engine.add([1], GREEDY)
    drain(engine)
    assert again.tokens == alone([1], GREEDY)


def test_expert_source_is_recovered_before_the_step_after_a_failure():
    recovered = []
    engine, model = make(recover=lambda: recovered.append(len(model.steps)))
    model.before = lambda batch: 1 / 0
    engine.add([1], GREEDY)
    engine.step()
    assert recovered == []
    model.before = lambda batch: None
    engine.add([1], GREEDY)
    drain(engine)
    assert recovered == [0]


def test_logits_of_every_token_in_sweeps():
    engine, model = make(prefill_chunk=4)
    logits = engine.logits(np.arange(10))
    assert model.steps == [[4], [4], [2]]
    np.testing.assert_array_equal(logits[-1], engine.logits(list(range(10)))[-1])
    assert logits.shape == (10, VOCAB)
    assert logits[-1].argmax() == alone(list(range(10)), GREEDY)[0]
    model.before = lambda batch: batch.failures.append((0, ReadError("gone")))
    with pytest.raises(ReadError, match="gone"):
        engine.logits([1])
    with pytest.raises(RequestError, match="holds 64"):
        engine.logits([1] * 65)


def test_logprobs_belong_to_the_tokens():
    engine, _ = make()
    sequence = engine.add([1, 2], SamplingParams(temperature=0, max_tokens=4, logprobs=2))
    drain(engine)
    assert [p.token for p in sequence.logprobs] == sequence.tokens
    assert all(p.top[0] == (p.token, p.logprob) for p in sequence.logprobs)


SETUP = Setup("cpu", "arena", False, 10, 4, 320, 1 << 20, 8 << 30, 2)


def receipt(sequence, setup=SETUP):
    return Receipt.of(
        sequence.usage,
        setup,
        prompt_tokens=len(sequence.prompt),
        cached_tokens=sequence.cached,
        new_tokens=len(sequence.tokens),
        finish_reason=sequence.finish_reason,
        peak_rss=1 << 30,
    )


def test_receipts_divide_shared_steps_by_rows():
    engine, model = make(prefill_chunk=4)
    one, two = engine.add([1], SamplingParams(max_tokens=1)), engine.add([2, 3, 4], SamplingParams(max_tokens=1))
    drain(engine)
    first, second = receipt(one), receipt(two)
    assert (first.bytes_read, second.bytes_read) == (100, 300)
    assert (first.stall_s, second.stall_s) == (0.0625, 0.1875)
    assert first.bytes_read + second.bytes_read == model.io.bytes_read
    assert second.hit_rate == pytest.approx(1 / 3)  # round(3 * 1/4) hits, round(3 * 3/4) misses
    assert second.io_overlap == pytest.approx(0.75)


def test_receipt_times_names_lossy_settings_and_converts():
    engine, _ = make()
    sequence = engine.add([1, 2, 3], GREEDY)
    drain(engine)
    paper = receipt(sequence)
    assert paper.ttft_s > 0
    assert paper.prefill_tok_s == pytest.approx(3 / (sequence.usage.first - sequence.usage.started))
    assert paper.decode_tok_s == pytest.approx(5 / (sequence.usage.last - sequence.usage.first))
    assert any("LOSSY" in line and "active-experts 4 of 10" in line for line in paper.lines())
    assert paper.to_dict()["lossy"] == ["active-experts 4 of 10"]
    assert paper.to_dict()["experts_native"] == 10
    faithful = Setup("cpu", "page", True, 10, 10, 0, 0, 8 << 30, 2)
    assert not any("LOSSY" in line for line in receipt(sequence, faithful).lines())


def test_receipt_of_a_request_without_a_token():
    engine, _ = make()
    sequence = engine.add([1], GREEDY)
    engine.abort(sequence)
    paper = receipt(sequence)
    assert paper.ttft_s is paper.prefill_tok_s is paper.decode_tok_s is paper.hit_rate is paper.io_overlap is None
    assert "no token" in "\n".join(paper.lines())
