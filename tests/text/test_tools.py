"""Replies are taken apart as the model meant; malformed calls are left as they are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestream.text.tools import ToolCall, parse_reply

XML = """<tool_call>
<function=search>
<parameter=query>
two
lines
</parameter>
<parameter=limit>
5
</parameter>
<parameter=code>
12
</parameter>
</function>
</tool_call>"""
TOOLS = [
    {"type": "function", "function": {"name": "search", "parameters": {"properties": {"code": {"type": "string"}}}}}
]


def test_hermes_calls_and_content():
    first = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    second = '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>'
    reply = parse_reply(f"Sure.\n{first}\n{second}")
    assert reply.content == "Sure."
    assert reply.tool_calls == (ToolCall("f", {"a": 1}), ToolCall("g", {}))
    assert reply.reasoning is None


def test_xml_calls_use_the_declared_type():
    assert parse_reply(XML, TOOLS).tool_calls == (
        ToolCall("search", {"query": "two\nlines", "limit": 5, "code": "12"}),
    )
    assert parse_reply(XML).tool_calls[0].arguments["code"] == 12


def test_thought_is_split_off():
    for text, inside in (("<think>\nhm\n</think>\n\nyes", False), ("hm\n</think>\n\nyes", True)):
        reply = parse_reply(text, in_thought=inside)
        assert (reply.reasoning, reply.content) == ("hm", "yes")
    assert parse_reply("<think>cut off").content == ""
    assert parse_reply("<think>cut off").reasoning == "cut off"
    assert parse_reply("a <think> in the middle").content == "a <think> in the middle"


@pytest.mark.parametrize(
    "body", ["{", "[]", '{"arguments": {}}', '{"name": "f", "arguments": [1]}', '{"name": 3}', "[" * 100000]
)
def test_malformed_call_stays_text(body):
    text = f"<tool_call>{body}</tool_call>"
    reply = parse_reply(text)
    assert reply.tool_calls == ()
    assert reply.content == text


@given(st.text(alphabet='<>/=toolcaifuncprmes{}"[]\n thk', max_size=200))
@settings(deadline=None)
def test_any_text_is_accepted(text):
    reply = parse_reply(text, TOOLS)
    if "<think>" not in text and not reply.tool_calls:
        assert reply.content == text
