"""Replies read piece by piece: the same parts as the whole text holds, wherever the pieces are cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestream.text.reply_reader import CallArguments, CallStart, Content, Gathered, Reasoning, ReplyReader
from moestream.text.tool_formats import Hermes, Xml, format_of
from moestream.text.tools import parse_reply

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
        },
    }
]
HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x \\" }<"}}\n</tool_call>'
ODD_ORDER = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
AS_TEXT = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'
XML = (
    "<tool_call>\n<function=f>\n<parameter=a>\n7\n</parameter>\n"
    "<parameter=b>\nline\nnext\n</parameter>\n</function>\n</tool_call>"
)
NONE = "<tool_call>\n<function=f>\n</function>\n</tool_call>"
REPLIES = [
    "Plain text, nothing else.",
    "  spaces around \n",
    "a < b and <tool_ but no call",
    "<think>\nhm\n</think>\n\nSo it is.",
    "<think>never ends",
    "Calling:\n" + HERMES,
    HERMES + "\n" + HERMES,
    "<think>which?</think>" + XML + "\n" + NONE,
    ODD_ORDER,
    AS_TEXT,
    "broken <tool_call>{nothing}</tool_call> text",
    "cut off <tool_call>\n<funct",
]


def read(pieces, form, in_thought=False):
    reader, got = ReplyReader(form, TOOLS, in_thought), Gathered()
    events = [event for piece in pieces for event in reader.push(piece)] + reader.finish()
    got.add(events)
    return got, events


def parts(text):
    whole = parse_reply(text, TOOLS)
    return whole.reasoning or "", whole.content.strip(), [(c.name, c.arguments) for c in whole.tool_calls]


@pytest.mark.parametrize("form", [Hermes(), Xml()])
@pytest.mark.parametrize("text", REPLIES)
@given(data=st.data())
def test_pieces_mean_what_the_whole_means(form, text, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    got, _ = read(pieces, form)
    calls = [(call.name, json.loads(call.arguments)) for call in got.calls]
    assert (got.reasoning, got.content.strip(), calls) == parts(text)


def test_text_without_calls_keeps_its_white_space():
    assert read(list("  a b \n"), Hermes())[0].content == "  a b \n"
    assert read(["x <tool_call>{}</tool_call>"], None)[0].content == "x <tool_call>{}</tool_call>"


def test_arguments_come_while_they_are_written():
    _, events = read(list(HERMES), Hermes())
    assert events[0] == CallStart(0, "f")
    assert sum(isinstance(event, CallArguments) for event in events) > 10
    _, events = read(list(XML), Xml())
    assert [event.text for event in events if isinstance(event, CallArguments)] == [
        '{"a": 7',
        ', "b": "line\\nnext"',
        "}",
    ]


def test_a_prompt_that_ends_in_a_thought():
    got, events = read(["hm", "m</th", "ink>", " So."], Hermes(), in_thought=True)
    assert (got.reasoning, got.content) == ("hmm", "So.")
    assert isinstance(events[0], Reasoning)
    assert isinstance(events[-1], Content)


def test_arguments_that_are_cut_off_stay_as_written():
    got, _ = read(['<tool_call>\n{"name": "f", "arguments": {"a": '], Hermes())
    assert [(call.name, call.arguments) for call in got.calls] == [("f", '{"a": ')]


def test_families_are_told_apart_by_their_templates():
    assert isinstance(format_of("<tool_call> ... arguments"), Hermes)
    assert isinstance(format_of("<tool_call>\n<function=x>\n<parameter=y> arguments"), Xml)
    assert format_of("{{ messages }}") is None
