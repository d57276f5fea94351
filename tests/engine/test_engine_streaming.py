"""The engine on tiny models whose experts are on disk, with a rest after every piece of a sweep and a token in each."""

import itertools
import random

import pytest
from golden_models import GREEDY, PROMPTS
from streamed import BadSectors, check_idle
from test_engine_models import PARAMS, check_replies, run

from moestream.engine.engine import Engine
from moestream.engine.pace import Pace
from moestream.engine.state_budget import StateBudget
from moestream.errors import ReadError
from moestream.experts.store import ExpertStore
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights

pytestmark = pytest.mark.parametrize("tiny", ["qwen3-f16-single", "qwen3_5-f32-single"], indirect=True)


@pytest.fixture(autouse=True)
def many_rests(monkeypatch):
    monkeypatch.setattr("moestream.experts.stream.SWEEP_WAVE", 3)
    monkeypatch.setattr("moestream.experts.stream.LONGEST_WAVE", 5)
    monkeypatch.setattr("moestream.experts.store.LANDING_SLOTS", 2)
    monkeypatch.setattr("moestream.models.batch.BLOCK", 32)
    monkeypatch.setattr("moestream.models.batch.ALIGNED", 16)


@pytest.fixture
def disk():
    disk = BadSectors()
    yield disk
    disk.close()


@pytest.fixture
def alone(tiny, exact_ops):
    """What a request gets by itself from a resident model."""
    model = tiny.model(exact_ops)
    engine = Engine(model, vocab_size=model.config.vocab_size, context=256)
    return lambda prompt: run_alone(engine, prompt)


def run_alone(engine, prompt):
    return run(engine, [prompt])[0].tokens


def make(tiny, ops, disk, slots, **kwargs):
    config, names = parse_config(tiny.checkpoint.config)
    weights = map_weights(tiny.checkpoint, config, names)
    tables = [weights.experts.get(layer) for layer in range(len(config.layers))]
    store = ExpertStore(tables, tiny.checkpoint.files, slots, "arena", disk)
    model = tiny.model(ops, store)
    model.read_ahead = store
    ticks = itertools.count()
    pace = Pace(0.0, lambda: float(next(ticks)))
    kwargs = {"vocab_size": config.vocab_size, "context": 256, "pace": pace, "recover": store.reset} | kwargs
    return Engine(model, **kwargs), store


@pytest.mark.parametrize("slots", [3, 8, 20])
def test_generates_what_transformers_generates(tiny, exact_ops, disk, slots):
    engine, store = make(tiny, exact_ops, disk, slots, prefill_chunk=70)
    check_replies(engine, tiny, apart=3)
    check_idle(store)


def test_sweeps_borrow_slots_and_give_them_back(tiny, exact_ops, disk):
    """For themselves and for what rests meanwhile; replies do not show it."""
    engine, store = make(tiny, exact_ops, disk, 20, prefill_chunk=70)
    asked = []

    def lend_for(rows):
        asked.append(rows)
        store.lend(rows // 8)

    engine._model.lend_for = lend_for
    check_replies(engine, tiny, apart=3)
    assert (min(asked), max(asked)) == (1, 70)
    assert engine._model._rows == 0
    assert store.usable == 20
    check_idle(store)


@pytest.mark.parametrize("seed", range(6))
def test_who_leaves_at_any_time_takes_nothing_along(tiny, fast_ops, disk, seed):
    """Also where steps are interrupted, while sweeps are at rest and while they run."""
    rng = random.Random(seed)
    budget = StateBudget(700, per_token=1)
    engine, store = make(tiny, fast_ops, disk, rng.choice([3, 8, 28]), prefill_chunk=70, max_batch=3, states=budget)
    prompts = [tiny.ids(p)[: len(tiny.ids(p)) - GREEDY - cut].tolist() for p in PROMPTS for cut in (0, 3)]
    expected = [run_alone(engine, prompt) for prompt in prompts]
    running = {}
    for _ in range(400):
        if len(running) < 5 and rng.random() < 0.2:
            i = rng.randrange(len(prompts))
            running[engine.add(prompts[i], PARAMS)] = i
        if rng.random() < 0.06 and running:
            engine.abort(rng.choice(list(running)))
        if rng.random() < 0.02:
            interrupt(engine, rng)
        else:
            engine.step()
        for sequence in [s for s in running if s.finished]:
            i = running.pop(sequence)
            assert sequence.finish_reason in ("length", "cancelled")
            whole = sequence.finish_reason == "length"
            assert sequence.tokens == (expected[i] if whole else expected[i][: len(sequence.tokens)])
    engine.close()
    assert budget.reserved == 0
    store.reset()
    check_idle(store)


def interrupt(engine, rng):
    """Ctrl-C somewhere in the reads of a step."""
    store = engine._model.experts
    left, submit = [rng.randrange(4)], store.reader.submit

    def stop(*args):
        submit(*args)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    store.reader.submit = stop
    try:
        engine.step()
    except KeyboardInterrupt:
        pass
    finally:
        store.reader.submit = submit


@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupt_just_when_a_sweep_rests_leaves_nothing_at_rest(tiny, fast_ops, disk, monkeypatch, earlier):
    """Nor when it was about to go on; even where somebody keeps the exception, and by that the pass, alive."""
    engine, store = make(tiny, fast_ops, disk, 8, prefill_chunk=70)
    prompt = tiny.ids(0)[:-GREEDY]
    expected = run_alone(engine, prompt)
    reply = engine.add(tiny.ids(1)[:-GREEDY], PARAMS)
    while not reply.tokens:
        engine.step()
    engine.add(prompt, PARAMS)
    while earlier and engine._resting is None:
        engine.step()
    run = engine._pace.run

    def stop(work):
        if not earlier and run(work) is not None:
            pytest.fail("the sweep does not rest")
        raise KeyboardInterrupt

    engine._decode_next = False
    with monkeypatch.context() as patch:
        patch.setattr(engine._pace, "run", stop)
        with pytest.raises(KeyboardInterrupt) as kept:
            engine.step()
    assert run_alone(engine, prompt) == expected
    assert kept.value is not None
    check_idle(store)


def test_unreadable_expert_ends_who_needs_it_and_nobody_else(tiny, exact_ops, disk, alone):
    """Whoever routes to it ends with the reason, sweeps and replies alike; the others do not notice."""
    config, names = parse_config(tiny.checkpoint.config)
    tables = map_weights(tiny.checkpoint, config, names).experts
    layer = max(tables)
    reasons = set()
    for expert in range(0, tables[layer].num_experts, 3):
        disk.bad = {tuple(tables[layer].ranges[expert, 0, :2].tolist())}
        engine, store = make(tiny, exact_ops, disk, 8, prefill_chunk=70)
        sequences = [engine.add(tiny.ids(2)[: 1 + n], PARAMS) for n in range(3)]
        for _ in range(3):
            engine.step()
        sequences.append(engine.add(tiny.ids(0)[:-GREEDY], PARAMS))
        while not engine.idle:
            engine.step()
        for sequence in sequences:
            reasons.add(sequence.finish_reason)
            tokens = alone(sequence.prompt)
            assert sequence.tokens == tokens[: len(sequence.tokens)]
            if sequence.finish_reason == "error":
                assert isinstance(sequence.error, ReadError)
            else:
                assert sequence.tokens == tokens
        check_idle(store)
        store.close()
    assert reasons == {"error", "length"}
