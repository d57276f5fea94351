"""Who runs when: pauses for replies under way, priorities, shares, memory for states; on a model that costs time."""

import itertools
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import GREEDY, VOCAB, HashModel, alone, drain

from moestream.engine.engine import Engine
from moestream.engine.pace import Pace
from moestream.engine.sampling import SamplingParams
from moestream.engine.scheduler import PATIENCE
from moestream.engine.sequence import Caller
from moestream.engine.state_budget import PAGE, StateBudget

LAYERS = 10


class CostModel(HashModel):
    """A pass takes ``fixed`` seconds for reading prompts, whatever their length, and more for each token."""

    def __init__(self, fixed=20.0, token=0.01, decode=0.2):
        super().__init__()
        self.now = 0.0
        self.half_way = {}  # states of passes that rest, by id
        self.closed = lambda: None
        self.fixed, self.token, self.decode = fixed, token, decode

    def layers(self, batch):
        half_way = {id(s.states): s.states for s in batch.segments}
        assert not self.half_way.keys() & half_way.keys(), "the pass of these states has not ended"
        self.half_way |= half_way
        sweep = self.fixed if any(s.length > 1 for s in batch.segments) else 0.0
        try:
            for layer in range(LAYERS):
                self.now += (sweep + self.decode + self.token * len(batch.ids)) / LAYERS
                if layer + 1 < LAYERS and (yield "layer"):
                    yield "layer"
        except GeneratorExit:
            self.closed()
            raise
        for states in half_way:
            del self.half_way[states]
        return self.forward(batch)


def make(model, stall, **kwargs):
    pace = Pace(stall, lambda: model.now)
    return Engine(model, **({"vocab_size": VOCAB, "context": 10_000, "prefill_chunk": 500, "pace": pace} | kwargs))


def prompt(length, seed=0):
    return [(seed + i * i) % VOCAB for i in range(length)]


def timed(engine, model, watched):
    """Times of the tokens of a sequence, until everything has ended."""
    times = []
    while not engine.idle:
        before = len(watched.tokens)
        engine.step()
        times += [model.now] * (len(watched.tokens) - before)
    return times


@pytest.mark.parametrize("stall", [2.5, 5.0, 100.0])
def test_a_long_prompt_lets_replies_go_on(stall):
    model = CostModel()
    engine = make(model, stall)
    reply = engine.add([1, 2], SamplingParams(temperature=0, max_tokens=60))
    for _ in range(30):
        engine.step()
    agent = engine.add(prompt(2000), GREEDY)
    times = timed(engine, model, reply)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert max(gaps) <= min(stall, 20.0 + 0.2 + 5.0) + 0.3 + 1e-9  # a step of the reply comes on top
    assert agent.tokens == alone_long(2000)
    assert reply.tokens == alone([1, 2], SamplingParams(temperature=0, max_tokens=60))


def alone_long(length):
    model = HashModel()
    engine = Engine(model, vocab_size=VOCAB, context=10_000)
    sequence = engine.add(prompt(length), GREEDY)
    drain(engine)
    return sequence.tokens


def test_without_a_bound_a_prompt_holds_replies_up():
    model = CostModel()
    engine = make(model, None)
    reply = engine.add([1, 2], SamplingParams(temperature=0, max_tokens=60))
    for _ in range(30):
        engine.step()
    engine.add(prompt(2000), GREEDY)
    gaps = [b - a for a, b in itertools.pairwise(timed(engine, model, reply))]
    assert max(gaps) > 20


def test_the_prompt_keeps_at_least_half_the_time():
    """Even where a token of the replies takes longer than the bound."""
    model = CostModel(decode=8.0)
    engine = make(model, 0.001)
    for seed in range(3):
        engine.add([seed, 2], SamplingParams(temperature=0, max_tokens=200))
    for _ in range(40):
        engine.step()
    start = model.now
    agent = engine.add(prompt(500), SamplingParams(temperature=0, max_tokens=1))
    while not agent.finished:
        engine.step()
    sweep = 20.0 + 8.0 + 5.0
    assert model.now - start <= 3 * sweep + 2 * 8.1


def test_short_prompts_ride_along_with_a_step_of_replies():
    model = CostModel(fixed=0.0, decode=0.1, token=0.001)
    engine = make(model, 1.0)
    engine.add([1, 2], SamplingParams(temperature=0, max_tokens=100))
    engine.add(prompt(100, 3), GREEDY)  # shows what a prompt costs here
    for _ in range(10):
        engine.step()
    engine.add(prompt(60, 5), GREEDY)
    model.steps.clear()
    engine.step()
    assert sorted(model.steps[0]) == [1, 60]


def test_a_short_prompt_does_not_wait_for_a_long_one():
    model = CostModel()
    engine = make(model, 1.0)
    agent = engine.add(prompt(5000), GREEDY)
    engine.step()
    question = engine.add(prompt(40, 7), GREEDY)
    while not question.tokens:
        engine.step()
    assert agent.computed <= 1000
    drain(engine)
    assert agent.tokens == alone_long(5000)


def test_a_cancelled_prompt_ends_its_sweep():
    model = CostModel()
    engine = make(model, 2.5)
    agent = engine.add(prompt(400), GREEDY)
    engine.step()
    assert engine.step() == []
    states = weakref.ref(agent.states)
    engine.abort(agent)
    model.half_way.clear()
    assert states() is None  # memory is free at once, though no step may follow
    before = model.now
    assert engine.step() == []
    assert engine.idle
    assert model.now == before


def test_a_cancelled_member_of_a_sweep_at_rest_holds_its_memory_until_that_ends():
    """Its states are part of the pass; whoever comes next must not be let in on their account."""
    model = CostModel()
    budget = StateBudget(2 * PAGE + 10, per_token=1)
    engine = make(model, 2.5, states=budget)
    first, second = engine.add(prompt(PAGE - 1), GREEDY), engine.add(prompt(PAGE - 2, 1), GREEDY)
    engine.step()
    assert engine.step() == []
    assert len(model.half_way) == 2
    before = budget.reserved
    engine.abort(second)
    assert budget.reserved == before
    third = engine.add(prompt(PAGE - 3, 2), GREEDY)
    while model.half_way:
        assert third.states is None
        assert budget.reserved == before
        engine.step()
    assert first.tokens
    assert budget.reserved < before
    drain(engine)
    assert third.tokens == alone(prompt(PAGE - 3, 2), GREEDY, context=10_000)
    assert budget.reserved == 0


def test_a_step_that_fails_beside_a_sweep_at_rest_leaves_it_alone():
    model = CostModel()
    recovered = []
    engine = make(model, 2.5, recover=lambda: recovered.append(list(model.half_way)))
    reply = engine.add([1, 2], SamplingParams(temperature=0, max_tokens=200))
    while not reply.tokens:
        engine.step()
    agent = engine.add(prompt(400), GREEDY)
    while not model.half_way:
        engine.step()
    model.before = lambda batch: 1 / 0
    [event] = engine.step()
    assert event.sequence is reply
    assert reply.finish_reason == "error"
    model.before = lambda batch: None
    drain(engine)
    assert len(recovered) == 1
    assert agent.tokens == alone_long(400)


def test_a_sweep_cancelled_after_such_a_failure_ends_once_the_store_is_sound():
    """Closing it asks the store to let go of what it holds."""
    model = CostModel()
    events = []
    engine = make(model, 2.5, recover=lambda: events.append("recovered"))
    model.closed = lambda: events.append("closed")
    reply = engine.add([1, 2], SamplingParams(temperature=0, max_tokens=200))
    while not reply.tokens:
        engine.step()
    agent = engine.add(prompt(400), GREEDY)
    while not model.half_way:
        engine.step()
    model.before = lambda batch: 1 / 0
    engine.step()
    engine.abort(agent)
    assert engine.idle
    assert events == []
    model.before = lambda batch: None
    model.half_way.clear()
    engine.add([3], GREEDY)
    drain(engine)
    assert events == ["recovered", "closed"]


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 900), st.integers(1, 30), st.integers(-1, 2), st.integers(0, 40)),
        min_size=1,
        max_size=8,
    ),
    stall=st.sampled_from([None, 0.01, 1.0, 3.0, 50.0]),
    fixed=st.sampled_from([0.0, 0.5, 20.0]),
    budget=st.sampled_from([None, 1000, 1500, 4000]),
    max_batch=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_everybody_ends_with_the_same_tokens_as_alone(requests, stall, fixed, budget, max_batch):
    model = CostModel(fixed=fixed)
    states = None if budget is None else StateBudget(budget, per_token=1, per_sequence=10)
    engine = make(model, stall, states=states, max_batch=max_batch, context=960, prefill_chunk=200)
    sequences = []
    for seed, (length, tokens, priority, delay) in enumerate(requests):
        params = SamplingParams(temperature=0, max_tokens=tokens)
        sequences.append(engine.add(prompt(length, seed), params, caller=Caller(f"c{seed % 2}", priority)))
        for _ in range(delay):
            engine.step()
            assert states is None or states.reserved <= budget
    for _ in range(20_000):
        engine.step()
        if engine.idle:
            break
    assert engine.idle
    for seed, (sequence, (length, tokens, _, _)) in enumerate(zip(sequences, requests, strict=True)):
        lone = Engine(HashModel(), vocab_size=VOCAB, context=960)
        expected = lone.add(prompt(length, seed), SamplingParams(temperature=0, max_tokens=tokens))
        drain(lone)
        assert sequence.tokens == expected.tokens
        assert sequence.states is None
    assert states is None or states.reserved == 0


def order_of_starts(engine, sequences):
    """Indices of sequences in the order of their first tokens."""
    seen = []
    while not engine.idle:
        engine.step()
        seen += [i for i, s in enumerate(sequences) if s.tokens and i not in seen]
    return seen


def test_lower_priority_numbers_go_first_and_a_place_is_kept_for_them():
    engine = make(CostModel(), None, max_batch=2)
    batch = [engine.add([i, 1], GREEDY, caller=Caller("batch", 5)) for i in range(3)]
    engine.step()
    assert [bool(s.tokens) for s in batch] == [True, False, False]
    person = engine.add([9, 9], GREEDY, caller=Caller("person", 0))
    engine.step()
    assert person.tokens
    urgent = engine.add([8, 8], GREEDY, caller=Caller("person", -1))
    normal = engine.add([7, 8], GREEDY, caller=Caller("person", 0))
    assert order_of_starts(engine, [batch[1], urgent, normal])[0] == 1
    assert all(s.finished for s in (*batch, person, urgent, normal))


def test_what_can_wait_is_overtaken_a_bounded_number_of_times():
    engine = make(CostModel(), None, max_batch=1)
    last = engine.add([1], GREEDY, caller=Caller("batch", 1000))
    overtaken = 0
    for i in range(3 * PATIENCE):
        engine.add([i % VOCAB, 2], SamplingParams(temperature=0, max_tokens=1), caller=Caller("person"))
        engine.step()
        if last.tokens:
            break
        overtaken += 1
    assert overtaken == PATIENCE


def test_a_client_with_many_requests_lets_another_in():
    engine = make(CostModel(), None, max_batch=2)
    many = [engine.add([i, 3], GREEDY, caller=Caller("agent")) for i in range(20)]
    engine.step()
    other = engine.add([1, 4], GREEDY, caller=Caller("person"))
    starts = order_of_starts(engine, [*many, other])
    assert starts.index(20) <= 3


def test_memory_for_states_is_shared_by_what_is_needed():
    """Four short ones run where one of full length would; the last to come gives way as they grow, and still ends."""
    budget = StateBudget(4 * PAGE + 300, per_token=1, per_sequence=10)
    engine = make(CostModel(), None, states=budget, max_batch=8, context=4 * PAGE)
    params = SamplingParams(temperature=0, max_tokens=None)
    sequences = [engine.add([i, 5], params) for i in range(4)]
    engine.step()
    assert all(len(s.tokens) == 1 for s in sequences)
    events = drain(engine)
    assert engine.preemptions > 0
    assert budget.reserved == 0
    assert all(len(s.tokens) == 4 * PAGE - 2 for s in sequences)
    assert len({(id(e.sequence), i) for i, e in enumerate(events)}) == 4 * (4 * PAGE - 2) - 4
    free = make(CostModel(), None, context=4 * PAGE)
    expected = [free.add([i, 5], params) for i in range(4)]
    drain(free)
    assert [s.tokens for s in sequences] == [s.tokens for s in expected]


def test_equal_prompts_are_read_once():
    model = CostModel()
    engine = make(model, None, max_batch=5)
    params = [SamplingParams(temperature=1, seed=seed, max_tokens=6) for seed in range(4)]
    sequences = [engine.add(prompt(300), p) for p in params]
    scored = engine.add(prompt(300), SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    drain(engine)
    assert sum(sum(step) for step in model.steps) == 2 * 300 + 4 * 5
    assert len(scored.prompt_logprobs) == 299
    for sequence, p in zip(sequences, params, strict=True):
        lone = make(CostModel(), None)
        expected = lone.add(prompt(300), p)
        drain(lone)
        assert sequence.tokens == expected.tokens


def test_a_leader_that_leaves_takes_nobody_with_it():
    engine = make(CostModel(), None, max_batch=2, prefill_chunk=100)
    leader, follower = engine.add(prompt(300), GREEDY), engine.add(prompt(300), GREEDY)
    engine.step()
    engine.abort(leader)
    drain(engine)
    assert follower.tokens == alone_long(300)


def test_a_sweep_at_rest_is_never_displaced():
    """The one reply under way gives its memory up meanwhile: the prompts that are left wait for the sweep."""
    model = CostModel(fixed=0.0)
    budget = StateBudget(5 * PAGE, per_token=1)
    engine = make(model, 1.0, states=budget, context=1000)
    engine.add(prompt(60), SamplingParams(temperature=0, max_tokens=1))
    drain(engine)  # so many tokens may ride along
    params = SamplingParams(temperature=0, max_tokens=200)
    reply = engine.add(prompt(PAGE - 4, 1), params, caller=Caller(priority=1))
    while not reply.tokens:
        engine.step()
    agent = engine.add(prompt(400, 2), params)
    while not model.half_way:
        engine.step()
    question = engine.add(prompt(300, 3), params)
    while reply.computed < PAGE:
        engine.step()
    model.fixed = 50.0  # more than is known
    drain(engine)
    assert engine.preemptions == 1
    for seed, sequence in enumerate((reply, agent, question), 1):
        lone = Engine(HashModel(), vocab_size=VOCAB, context=1000)
        expected = lone.add(sequence.prompt, params)
        drain(lone)
        assert sequence.tokens == expected.tokens, seed


@pytest.mark.parametrize(("mine", "priority"), [("batch", 0), ("person", 1)])
def test_nobody_waits_for_a_leader_whose_turn_comes_later(mine, priority):
    engine = make(CostModel(), None, max_batch=2)
    running = engine.add([1], GREEDY, caller=Caller("batch"))
    engine.step()
    later = engine.add(prompt(300), GREEDY, caller=Caller("batch", 1))
    first = engine.add(prompt(300), GREEDY, caller=Caller(mine, priority))
    last = engine.add(prompt(300), GREEDY, caller=Caller("batch", 1))
    assert (later.leader, first.leader, last.leader) == (None, None, first)
    engine.step()
    assert running.states is not None
