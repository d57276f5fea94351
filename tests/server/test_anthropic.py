"""/v1/messages with the anthropic client."""

import json

import anthropic
import pytest
from test_openai_chat import PERSON, WEATHER

HELLO = [{"role": "user", "content": "Hello there"}]
TOOL = {"name": "get_weather", "description": "Weather", "input_schema": WEATHER["function"]["parameters"]}


def read(usage):
    """Tokens of the prompt, cached or not."""
    return usage.input_tokens + usage.cache_read_input_tokens


def ask(claude, messages=HELLO, *, body=None, **changes):
    given = {"model": "demo", "max_tokens": 40, "messages": messages} | changes
    return claude.messages.create(**given, extra_body={"temperature": 0} | (body or {}))


def test_message_and_its_stream(claude):
    whole = ask(claude, system="Be kind.")
    assert whole.content[0].type == "text"
    assert whole.stop_reason == "end_turn"
    assert whole.usage.receipts[0]["new_tokens"] == whole.usage.output_tokens
    with claude.messages.stream(
        model="demo", max_tokens=40, messages=HELLO, system="Be kind.", extra_body={"temperature": 0}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_delta") > 3


def test_stop_reasons(claude):
    text = ask(claude).content[0].text
    word = text.split()[2]
    stopped = ask(claude, stop_sequences=[word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert stopped.content[0].text == text[: text.index(word)]
    assert ask(claude, max_tokens=2).stop_reason == "max_tokens"


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}]
)
def test_a_forced_call_streams_and_its_result_is_taken(claude, choice):
    with claude.messages.stream(
        model="demo", max_tokens=150, messages=HELLO, tools=[TOOL], tool_choice=choice
    ) as stream:
        deltas = [e for e in stream if e.type == "content_block_delta" and e.delta.type == "input_json_delta"]
        called = stream.get_final_message()
    assert len(deltas) > 1
    assert called.stop_reason == "tool_use"
    block = called.content[-1]
    assert set(block.input) == {"city", "unit"}
    result = {
        "type": "tool_result",
        "tool_use_id": block.id,
        "content": [{"type": "text", "text": "21"}],
        "is_error": True,
    }
    history = [*HELLO, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    assert read(ask(claude, history, tools=[TOOL]).usage) > read(called.usage)


def test_json_of_a_schema(claude):
    reply = ask(claude, max_tokens=400, output_config={"format": {"type": "json_schema", "schema": PERSON}})
    assert set(json.loads(reply.content[0].text)) == {"name", "age", "tags"}


def test_tokens_are_counted_as_they_are_used(claude):
    blocks = [
        {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "there"},
    ]
    messages = [{"role": "user", "content": blocks}]
    counted = claude.messages.count_tokens(model="demo", messages=messages, tools=[TOOL])
    assert counted.input_tokens == read(ask(claude, messages, tools=[TOOL], max_tokens=1).usage)
    assert ask(claude, thinking={"type": "disabled"}, max_tokens=1)  # the demo never thinks


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"body": {"mcp_servers": []}}, "mcp_servers"),
        ({"body": {"temperature": 3}}, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}]}]},
            "messages",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "nope"}}, "nope"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
    ],
)
def test_wrong_and_unsupported_parameters_are_named(claude, change, name):
    with pytest.raises(anthropic.BadRequestError, match=name) as caught:
        ask(claude, **change)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"


def test_models(claude):
    assert [model.display_name for model in claude.models.list()] == ["demo"]


def test_other_errors(claude):
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(claude, model="claude-9")
    assert caught.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="context of 2048"):
        ask(claude, [{"role": "user", "content": "word " * 3000}])
