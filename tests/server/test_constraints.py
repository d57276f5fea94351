"""Grammars: whatever is drawn under them is a reply that the reader understands and the schema allows."""

import json

import numpy as np
import pytest
from text_models import tokenizer_of

from moestream.engine.sampling import Sampler, SamplingParams
from moestream.server.constraints import Grammars, Shape
from moestream.server.errors import ApiError
from moestream.text.reply_reader import Gathered, ReplyReader
from moestream.text.tokenizer import Tokenizer
from moestream.text.tool_formats import Hermes, Xml

SIZE = 260
TOOLS = [
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "set_alarm",
            "parameters": {
                "type": "object",
                "properties": {
                    "hour": {"type": "integer", "minimum": 0, "maximum": 23},
                    "unit": {"type": "string", "enum": ["am", "pm"]},
                    "on": {"$ref": "#/$defs/flag"},
                },
                "required": ["hour", "unit", "on"],
                "additionalProperties": False,
                "$defs": {"flag": {"type": "boolean"}},
            },
        },
    },
]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer():
    backend = tokenizer_of(SIZE)
    return Tokenizer(backend, [backend.token_to_id("<|im_end|>")], {})


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, SIZE + 4, thinks=True)  # a model may have more rows than the tokenizer has tokens


def draw(constraint, tokenizer, seed, start="", bias=()):
    """Random tokens under a constraint, as the engine draws them; printable ones are likelier, so that texts end."""
    params = SamplingParams(seed=seed, temperature=1.0)
    sampler = Sampler(params, [], constraint)
    logits = np.random.default_rng(seed).normal(size=SIZE + 4).astype(np.float32)
    for text, value in {
        "<": 3.0,
        "\n": 2.0,
        "</think>": 6.0,
        '"': 3.0,
        "}": 3.0,
        "<|im_end|>": 3.0,
        **dict(bias),
    }.items():
        logits[tokenizer.encode(text)] += value
    ids = []
    while not constraint.complete and len(ids) < 4000:
        token = sampler.sample(logits, ids).token
        if token in tokenizer.eos_ids:
            break
        ids.append(token)
    return start + tokenizer.decode(ids, skip_special=False)


def gather(text, form, in_thought=False):
    reader, got = ReplyReader(form, TOOLS if form else (), in_thought), Gathered()
    got.add([*reader.push(text), *reader.finish()])
    return got


@pytest.mark.parametrize("in_thought", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_json_after_any_thought(grammars, tokenizer, seed, in_thought):
    text = draw(grammars.constraint(Shape(SCHEMA), in_thought), tokenizer, seed)
    got = gather(text, None, in_thought)
    assert set(json.loads(got.content)) == {"x"}


@pytest.mark.parametrize("form", [Hermes(), Xml()])
@pytest.mark.parametrize("seed", range(6))
def test_forced_calls_are_valid(grammars, tokenizer, form, seed):
    shape = Shape(form=form, tools=TOOLS, must_call=True, parallel=False)
    got = gather(draw(grammars.constraint(shape, False), tokenizer, seed), form)
    assert not got.content
    assert len(got.calls) == 1
    arguments = json.loads(got.calls[0].arguments)
    if got.calls[0].name == "set_alarm":
        assert set(arguments) == {"hour", "unit", "on"}
        assert 0 <= arguments["hour"] <= 23
        assert arguments["unit"] in ("am", "pm")
        assert isinstance(arguments["on"], bool)
    else:
        assert got.calls[0].name == "now"


NOTE = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "kind": {"type": "string", "enum": ["\u00e9\U0001f98a"]},
                "title": {"type": "string"},
            },
            "required": ["text", "kind"],
        },
    },
}


def test_free_text_of_a_parameter_may_hold_anything_but_its_end(grammars, tokenizer):
    constraint = grammars.constraint(Shape(form=Xml(), tools=[NOTE], must_call=True, parallel=False), False)
    text = "if a < b:\n  </param> {\u00e9\U0001f98a"
    call = f"<tool_call>\n<function=note>\n<parameter=text>\n{text}\n</parameter>\n"
    call += "<parameter=kind>\n\u00e9\U0001f98a\n</parameter>\n</function>\n</tool_call>"
    for token in tokenizer.encode(call):
        logits = np.zeros(SIZE + 4, np.float32)
        constraint.mask(logits)
        assert np.isfinite(logits[token])
        constraint.accept(token)
    assert constraint.complete
    reader, got = ReplyReader(Xml(), [NOTE]), Gathered()
    got.add([*reader.push(call), *reader.finish()])
    assert json.loads(got.calls[0].arguments) == {"text": text, "kind": "\u00e9\U0001f98a"}


def test_parallel_calls(grammars, tokenizer):
    shape = Shape(form=Hermes(), tools=TOOLS[:1], must_call=True)
    bias = {"<": 8.0, "}": 9.0}
    counts = [
        len(gather(draw(grammars.constraint(shape, False), tokenizer, seed, bias=bias.items()), Hermes()).calls)
        for seed in range(6)
    ]
    assert min(counts) >= 1
    assert max(counts) > 1


def test_masked_tokens_are_never_drawn(grammars):
    """Also not when a random number rounds up to the total weight."""
    constraint = grammars.constraint(Shape({"enum": ["ab"]}), False)
    sampler = Sampler(SamplingParams(seed=0), [], constraint)
    sampler._random = type("Ones", (), {"random": staticmethod(lambda: 1.0 - 2.0**-53)})()
    logits = np.zeros(SIZE + 4, np.float32)
    reply = []
    while not constraint.complete:
        reply.append(sampler.sample(logits, reply).token)
    assert len(reply) >= 4
    assert not logits.any()  # the caller's logits are untouched


def test_thoughts_end_when_their_budget_is_used_up(grammars, tokenizer):
    end = tokenizer.token_id("</think>")
    for in_thought in (True, False):
        constraint = grammars.thought_budget(grammars.constraint(Shape(SCHEMA), in_thought), 5, in_thought)
        text = draw(constraint, tokenizer, 1, bias={"</think>": -9.0, "<think>": 9.0}.items())
        thought = text.removeprefix("<think>").split("</think>")[0]
        assert len(tokenizer.encode(thought)) == 5
        assert set(json.loads(text.split("</think>")[1])) == {"x"}
    free = grammars.thought_budget(None, 2, in_thought=True)
    logits = np.zeros(SIZE + 4, np.float32)
    for token in (3, 4):
        free.mask(logits)
        free.accept(token)
    free.mask(logits)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [end]


def test_what_cannot_be_enforced_is_refused(tokenizer, grammars):
    with pytest.raises(ApiError, match="Invalid type"):
        grammars.constraint(Shape({"type": "frob"}), False)
    with pytest.raises(ApiError, match="does not think"):
        Grammars(tokenizer, SIZE, thinks=False).thought_budget(None, 5, False)
