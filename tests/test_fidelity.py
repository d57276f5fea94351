"""The fast mode on the model in the package: next-token distributions stay close to the exact mode's."""

from __future__ import annotations

import importlib.util

import numpy as np
import numpy.typing as npt
import pytest

from moestream import LLM

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("moestream._native") is None, reason="the reference has no fast mode"
)
STORY = (
    "Once upon a time, there was a little fox named Ruby who lived at the edge of a quiet forest. Every morning she "
    "walked to the river to watch the fish swim. One day she found an old key under a stone. She showed it to her "
    "friend, the owl, who said that it must open the door of the mill. Together they crossed the bridge, and behind "
    "the door they found a room full of lanterns. Ruby was so happy that she gave one to every animal she knew."
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CALL = [
    {"role": "user", "content": "What is the weather in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [ASKED]},
    {"role": "tool", "content": '{"temperature": 18, "sky": "cloudy"}'},
    {"role": "assistant", "content": "It is 18 degrees and cloudy in Paris."},
]
LARGEST_MEAN_KL = 0.01
"""Nats a token; ten to a hundred times what int8 activations cost (docs/performance.md)."""


def log_probabilities(**settings: object) -> list[npt.NDArray[np.float64]]:
    """Log softmax [T, V] after every token of both texts."""
    with LLM.load("demo", ram="2GB", max_batch=1, **settings) as llm:
        story = llm.encode(llm.render([{"role": "user", "content": "Tell me a story"}]) + STORY)
        call = llm.encode(llm.render(CALL, tools=[TOOL]))
        logits = [llm.logits(ids).astype(np.float64) for ids in (story, call)]
    return [
        x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) for x in logits
    ]


def mean_kl(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def test_fast_mode_keeps_the_distributions() -> None:
    exact = log_probabilities(exact=True)
    fast = log_probabilities(exact=False)
    lossy = log_probabilities(exact=True, active_experts=1)
    for p, q in zip(exact, fast, strict=True):
        assert len(p) > 80
        assert 0 < mean_kl(p, q) < LARGEST_MEAN_KL
        assert np.mean(p.argmax(1) == q.argmax(1)) > 0.95
    assert all(mean_kl(p, q) > LARGEST_MEAN_KL for p, q in zip(exact, lossy, strict=True))  # the bound can be exceeded
