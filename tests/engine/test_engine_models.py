"""The engine on real tiny models: what ``transformers`` generated, in any company and any chunking."""

import itertools

import numpy as np
import pytest
from golden_models import GREEDY, PROMPTS, Golden, ResidentExperts, assert_close

from moestream.engine.engine import Engine
from moestream.engine.pace import Pace
from moestream.engine.prefix import PrefixCache
from moestream.engine.sampling import SamplingParams
from moestream.engine.state_budget import StateBudget
from moestream.errors import ReadError
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights

pytestmark = pytest.mark.parametrize("tiny", ["qwen3-f16-single", "qwen3_5-f32-single"], indirect=True)
PARAMS = SamplingParams(temperature=0, max_tokens=GREEDY, ignore_eos=True)


@pytest.fixture
def experts(tiny: Golden) -> ResidentExperts:
    config, names = parse_config(tiny.checkpoint.config)
    return ResidentExperts(tiny.checkpoint, map_weights(tiny.checkpoint, config, names))


def make(tiny, ops, experts, **kwargs):
    model = tiny.model(ops, experts)
    return Engine(model, vocab_size=model.config.vocab_size, context=256, **kwargs)


def run(engine, prompts, params=PARAMS, apart=0):
    """Sequences that have ended; each was added so many steps after the one before."""
    sequences = []
    for prompt in prompts:
        sequences.append(engine.add(prompt, params))
        for _ in range(apart):
            engine.step()
    while not engine.idle:
        engine.step()
    return sequences


def check_replies(engine, tiny, apart=0):
    """What ``transformers`` generates, whatever runs beside it."""
    sequences = run(engine, [tiny.ids(p)[:-GREEDY] for p in PROMPTS], apart=apart)
    for sequence, p in zip(sequences, PROMPTS, strict=True):
        assert sequence.tokens == tiny.ids(p)[-GREEDY:].tolist()


@pytest.mark.parametrize(("max_batch", "chunk"), [(1, 512), (3, 512), (2, 37)])
def test_generates_what_transformers_generates(tiny, exact_ops, experts, max_batch, chunk):
    engine = make(tiny, exact_ops, experts, max_batch=max_batch, prefill_chunk=chunk)
    check_replies(engine, tiny)


def test_rests_between_layers_change_nothing(tiny, exact_ops, experts):
    """Every sweep rests after each of its layers, for a token of those that decode."""
    ticks = itertools.count()
    pace = Pace(0.0, lambda: float(next(ticks)))
    engine = make(tiny, exact_ops, experts, max_batch=3, prefill_chunk=37, pace=pace)
    check_replies(engine, tiny, apart=3)


@pytest.mark.parametrize("cached", [False, True])
def test_states_given_up_and_read_again_change_nothing(tiny, exact_ops, experts, monkeypatch, cached):
    monkeypatch.setattr("moestream.engine.state_budget.PAGE", 4)
    prompts = [tiny.ids(p)[:-GREEDY] for p in PROMPTS]
    budget = StateBudget(sum(map(len, prompts)) + 3 * len(prompts) + 4, per_token=1)
    config, _ = parse_config(tiny.checkpoint.config)
    prefixes = PrefixCache(1 << 30, any(plan.mixer == "delta_net" for plan in config.layers)) if cached else None
    engine = make(tiny, exact_ops, experts, states=budget, prefixes=prefixes)
    sequences = run(engine, prompts)
    assert engine.preemptions > 0
    assert budget.reserved == 0
    for sequence, p in zip(sequences, PROMPTS, strict=True):
        assert sequence.tokens == tiny.ids(p)[-GREEDY:].tolist()


def test_equal_prompts_start_from_the_same_states(tiny, exact_ops, experts):
    prompt = tiny.ids(0)[:-GREEDY]
    for sequence in run(make(tiny, exact_ops, experts), [prompt] * 3):
        assert sequence.tokens == tiny.ids(0)[-GREEDY:].tolist()


def test_logits_match_in_sweeps(tiny, exact_ops, experts):
    logits = make(tiny, exact_ops, experts, prefill_chunk=50).logits(tiny.ids(0))
    assert_close(logits, tiny.logits(0), tiny.logits_bound, "logits")


def test_unreadable_expert_leaves_neighbours_unharmed(tiny, exact_ops, experts):
    """One expert of the last layer with experts is lost: requests that route to it end, the others do not notice."""
    layer = max(experts.layers)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    prompts = [tiny.ids(2)[:1], tiny.ids(1)[:2], tiny.ids(2)[:3]]
    alone = [run(make(tiny, exact_ops, experts), [p], params)[0].tokens for p in prompts]
    reasons = []
    for expert in range(len(experts.layers[layer][2])):
        experts.fail = {(layer, expert): ReadError("shard.safetensors: cannot read at offset 4096: Input/output error")}
        for sequence, tokens in zip(run(make(tiny, exact_ops, experts), prompts, params), alone, strict=True):
            reasons.append(sequence.finish_reason)
            assert sequence.tokens == tokens[: len(sequence.tokens)]
            if sequence.finish_reason == "error":
                assert isinstance(sequence.error, ReadError)
                assert "Input/output error" in str(sequence.error)
            else:
                assert sequence.tokens == tokens
    assert {"error", "length"} == set(reasons)


def test_sampled_text_does_not_depend_on_company(tiny, exact_ops, experts):
    prompts = [tiny.ids(p)[:-GREEDY] for p in PROMPTS]
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=5, max_tokens=8, ignore_eos=True)
    together = [s.tokens for s in run(make(tiny, exact_ops, experts), prompts, params)]
    assert together == [run(make(tiny, exact_ops, experts), [p], params)[0].tokens for p in prompts]
    assert len({tuple(t) for t in together}) == len(prompts)


def test_weights_that_overflow_end_the_request(tiny, exact_ops, experts):
    engine = make(tiny, exact_ops, experts)
    good = engine.add(tiny.ids(2)[:-GREEDY], PARAMS)
    bad = engine.add(tiny.ids(1)[:-GREEDY], PARAMS)
    engine.step()
    state = next(s for s in bad.states.layers if hasattr(s, "v"))
    state.v[:] = np.nan  # as a state spoiled by overflow would be
    while not engine.idle:
        engine.step()
    assert bad.finish_reason == "error"
    assert "NaN or Inf" in str(bad.error)
    assert good.tokens == tiny.ids(2)[-GREEDY:].tolist()
