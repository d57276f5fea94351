"""Each step of the sampler against its definition written naively in float64."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moestream.engine.sampling import BLOCK, Sampler, SamplingParams, drawn, filtered, token_logprobs
from moestream.errors import NonFiniteLogitsError, RequestError

# few distinct values: ties are where filters go wrong
LOGITS = st.lists(st.sampled_from([-3.0, -0.5, 0.0, 0.25, 1.0, 2.5, 4.0]), min_size=1, max_size=40).map(
    lambda values: np.array(values, np.float32)
)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def naive_filter(logits, p):
    """Probabilities after temperature, top-k, top-p, min-p: [V], zero where dropped."""
    probs = softmax(logits.astype(np.float64) / p.temperature)
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept = order[: p.top_k] if p.top_k else order
    total = sum(probs[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        nucleus.append(i)
        reached += probs[i] / total
        if p.top_p < 1 and reached >= p.top_p:
            break
    kept = [i for i in nucleus if probs[i] >= p.min_p * probs[order[0]]]
    result = np.zeros(len(probs))
    result[kept] = probs[kept]
    return result / result.sum()


@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, 50),
    top_p=st.sampled_from([1.0, 0.901, 0.501, 0.051]),
    min_p=st.sampled_from([0.0, 0.049, 0.301, 1.0]),
)
@settings(max_examples=500, deadline=None)
def test_filters_equal_their_definition(logits, temperature, top_k, top_p, min_p):
    p = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = naive_filter(logits, p)
    ids, weights = filtered(logits, p)
    got = np.zeros(len(logits))
    got[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    # float32 exp against float64: a set may differ only where a cumulative sum meets top_p within rounding
    assume(not np.isclose(np.cumsum(np.sort(softmax(logits / np.float64(temperature)))[::-1]), top_p, atol=1e-5).any())
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_large_vocabulary_takes_the_same_path_as_a_small_one():
    logits = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    for p in (
        SamplingParams(top_p=0.3),
        SamplingParams(top_p=0.999),
        SamplingParams(top_k=1500, top_p=0.9, min_p=0.01),
    ):
        ids, weights = filtered(logits, p)
        expected = naive_filter(logits, p)
        assert set(ids) == set(np.flatnonzero(expected))
        np.testing.assert_allclose(weights / weights.sum(), expected[ids], rtol=1e-4)


@given(
    logits=LOGITS,
    prompt=st.lists(st.integers(0, 39), max_size=6),
    reply=st.lists(st.integers(0, 39), max_size=6),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([-0.5, 0.0, 1.5]),
    frequency=st.sampled_from([-0.25, 0.0, 0.75]),
)
@settings(max_examples=300, deadline=None)
def test_penalties_equal_their_definition(logits, prompt, reply, repetition, presence, frequency):
    prompt, reply = [t % len(logits) for t in prompt], [t % len(logits) for t in reply]
    expected = logits.astype(np.float64)
    for token in set(prompt) | set(reply):
        expected[token] *= 1 / repetition if expected[token] > 0 else repetition
    for token in set(reply):
        expected[token] -= presence + frequency * reply.count(token)
    params = SamplingParams(
        temperature=0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    before = logits.copy()
    chosen = Sampler(params, prompt).sample(logits, reply).token
    assert expected[chosen] >= expected.max() - 1e-5
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for params in (SamplingParams(seed=1), SamplingParams(seed=1, top_k=4)):
        sampler = Sampler(params, [])
        counts = np.bincount([sampler.sample(logits, []).token for _ in range(20000)], minlength=4)
        # 5 sigma of a binomial
        np.testing.assert_allclose(counts / 20000, np.exp(logits), atol=5 * np.sqrt(0.25 / 20000))


def test_greedy_takes_the_lowest_id_of_equals():
    assert Sampler(SamplingParams(temperature=0), []).sample(np.array([1, 3, 3, 2], np.float32), []).token == 1


def test_tiny_temperature_and_huge_logits_do_not_overflow():
    logits = np.array([3e38, -3e38, 0.0], np.float32)
    for temperature in (1e-30, 1.0, 100.0):
        assert Sampler(SamplingParams(temperature=temperature), []).sample(logits, []).token == 0


@pytest.mark.parametrize("count", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 77])
def test_a_draw_is_where_the_running_sum_passes_its_share(count):
    rng = np.random.default_rng(count)
    weights = rng.integers(0, 3, count).astype(np.float32)  # whole numbers: sums are exact
    weights[rng.integers(count)] = 1.0
    edges = np.cumsum(weights, dtype=np.float64)
    for u in [0.0, 1.0 - 2.0**-53, *rng.random(200)]:
        index = drawn(weights, u)
        assert weights[index] > 0
        assert edges[index] - weights[index] <= u * edges[-1] <= edges[index]


def test_a_draw_never_takes_what_weighs_nothing():
    weights = np.zeros(4 * BLOCK, np.float32)
    weights[BLOCK + 3] = 0.1
    assert {drawn(weights, u) for u in (0.0, 0.3, 0.999999, 1.0 - 2.0**-53)} == {BLOCK + 3}


def test_same_seed_same_draws_and_no_seed_differs():
    logits = np.zeros(1000, np.float32)
    draws = [[Sampler(SamplingParams(seed=s), []).sample(logits, []).token] for s in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    free = [
        tuple(s.sample(logits, []).token for _ in range(8)) for s in (Sampler(SamplingParams(), []) for _ in range(2))
    ]
    assert free[0] != free[1]


@given(logits=LOGITS, top=st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_logprobs_are_those_of_the_raw_distribution(logits, top):
    expected = np.log(softmax(logits.astype(np.float64)))
    params = SamplingParams(temperature=0.1, top_k=1, repetition_penalty=5.0, logprobs=top)
    sampled = Sampler(params, [0]).sample(logits, [0])
    assert sampled.logprobs.logprob == pytest.approx(expected[sampled.token], abs=1e-5)
    assert [t for t, _ in sampled.logprobs.top] == sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top]
    np.testing.assert_allclose([v for _, v in sampled.logprobs.top], np.sort(expected)[::-1][:top], atol=1e-5)


def test_logprobs_only_when_asked():
    assert Sampler(SamplingParams(), []).sample(np.zeros(4, np.float32), []).logprobs is None
    assert token_logprobs(np.zeros(4, np.float32), 2, 0).logprob == pytest.approx(-np.log(4))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_refused(bad, temperature):
    logits = np.zeros(50, np.float32)
    logits[17] = bad
    with pytest.raises(NonFiniteLogitsError, match="1 of 50 logits"):
        Sampler(SamplingParams(temperature=temperature, top_k=5), []).sample(logits, [1, 2])


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": "1"}, {"temperature": float("inf")},
        {"top_k": -1}, {"top_k": 1.5}, {"top_k": True}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2},
        {"repetition_penalty": 0.0}, {"presence_penalty": 101}, {"frequency_penalty": float("-inf")}, {"seed": -1},
        {"max_tokens": 0}, {"stop": ("",)}, {"stop": (1,)},
        {"stop_token_ids": (-1,)}, {"logprobs": -1}, {"logprobs": 101},
        {"logit_bias": 5}, {"logit_bias": [1, 2]}, {"logit_bias": {-1: 0.0}}, {"logit_bias": {1: 101.0}},
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(field):
    with pytest.raises(RequestError, match=next(iter(field))):
        SamplingParams(**field)


def test_stop_accepts_one_string():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_values_of_numpy_and_none_are_taken():
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), stop=None, stop_token_ids=None)
    assert (params.stop, params.stop_token_ids) == ((), ())
    assert 0 <= Sampler(params, [1]).sample(np.zeros(9, np.float32), []).token < 3
    assert SamplingParams(stop_token_ids=np.array([4, 5])).stop_token_ids == (4, 5)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids"])
@pytest.mark.parametrize("value", [3, True, 1.5, b"ab", {"a": 1}, object()])
def test_what_is_no_list_is_named(name, value):
    with pytest.raises(RequestError, match=f"{name} must be a list"):
        SamplingParams(**{name: value})
