"""/v1/chat/completions with the openai client."""

import json
import re

import openai
import pytest

STORY = [{"role": "user", "content": "Tell me a story about a fox"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"type": "string", "enum": ["c", "f"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def ask(client, messages=STORY, **changes):
    return client.chat.completions.create(**({"model": "demo", "messages": messages, "max_tokens": 12} | changes))


def test_whole_answer_with_its_receipt(server, client):
    seen = len(server.lines)
    reply = ask(client, temperature=0)
    choice, usage = reply.choices[0], reply.usage
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)
    receipt = usage.receipts[0]
    assert receipt["experts_used"] == receipt["experts_native"] == 6
    assert receipt["hits"] + receipt["misses"] > 0
    line = server.wait_line(rf"POST /v1/chat/completions 200 .*reply={reply.id} .*", seen)[0]
    assert f"prompt={usage.prompt_tokens} new=12 finish=length" in line
    assert "fox" not in line


def test_stream_equals_the_whole_answer(client):
    whole = ask(client, temperature=0)
    chunks = list(ask(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(d.delta.content or "" for d in deltas) == whole.choices[0].message.content
    assert [d.finish_reason for d in deltas][-1] == "length"
    assert len(deltas) > 8  # it did stream
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_seed_n_and_penalties(client):
    replies = ask(client, n=3, seed=5)
    texts = [choice.message.content for choice in replies.choices]
    assert len(set(texts)) > 1
    assert len(replies.usage.receipts) == 3
    assert replies.usage.completion_tokens == 36
    assert replies.usage.prompt_tokens == ask(client, max_tokens=1).usage.prompt_tokens
    one = ask(client, seed=5, extra_body={"top_k": 1, "min_p": 0.5})
    assert one.choices[0].message.content == ask(client, temperature=0).choices[0].message.content
    assert ask(client, temperature=0, frequency_penalty=2, presence_penalty=2, max_tokens=40)


def test_stop_ends_before_its_text(client):
    whole = ask(client, temperature=0, max_tokens=30).choices[0].message.content
    stop = whole.split()[3]
    cut = ask(client, temperature=0, max_tokens=30, stop=[stop, "never"])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == whole[: whole.index(stop)]


def test_logprobs(client):
    reply = ask(client, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2)
    entries = reply.choices[0].logprobs.content
    assert "".join(e.token for e in entries) == reply.choices[0].message.content
    assert all(e.logprob == e.top_logprobs[0].logprob <= 0 and len(e.top_logprobs) == 2 for e in entries)
    assert bytes(entries[0].bytes).decode() == entries[0].token
    streamed = [c.choices[0] for c in ask(client, temperature=0, max_tokens=3, logprobs=True, stream=True)]
    assert [e.token for c in streamed if c.logprobs for e in c.logprobs.content] == [e.token for e in entries]


def test_conversation_with_parts_and_roles(client):
    messages = [
        {"role": "developer", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]},
    ]
    first = ask(client, messages)
    assert ask(
        client, [*messages, first.choices[0].message, {"role": "user", "content": "And?"}]
    ).usage.prompt_tokens > (first.usage.prompt_tokens)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_is_valid_and_its_result_is_taken(client, choice, stream):
    question = [{"role": "user", "content": "Hello there"}]  # nothing that calls for a tool
    given = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 120, "parallel_tool_calls": False}
    if stream:
        with client.chat.completions.stream(
            model="demo", messages=question, stream_options={"include_usage": True}, **given
        ) as events:
            kinds = [event.type for event in events]
            final = events.get_final_completion()
        assert kinds.count("tool_calls.function.arguments.delta") > 1
    else:
        final = ask(client, question, **given)
    message = final.choices[0].message
    assert final.choices[0].finish_reason == "tool_calls"
    call = message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert set(arguments) == {"city", "unit"}
    assert arguments["unit"] in ("c", "f")
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'}
    history = [*question, message.model_dump(exclude={"parsed"}), result]
    assert ask(client, history, tools=[WEATHER]).usage.prompt_tokens > final.usage.prompt_tokens


def test_tools_the_model_chooses(client):
    """The demo was trained on calls; whichever it makes here has to come apart from the text."""
    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
    reply = ask(
        client, [{"role": "user", "content": "What is 3 + 4? Use add."}], tools=[tool], max_tokens=80, temperature=0
    )
    assert "<tool_call>" not in (reply.choices[0].message.content or "")
    without = ask(client, STORY, tools=[tool], tool_choice="none", temperature=0)
    assert without.usage.prompt_tokens == ask(client, STORY, max_tokens=1).usage.prompt_tokens
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert ask(client, STORY, tools=[strict], temperature=0).choices[0].message


@pytest.mark.parametrize("seed", range(3))
def test_json_of_a_schema_even_at_high_temperature(client, seed):
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    reply = ask(client, STORY, response_format=wanted, max_tokens=400, temperature=2, seed=seed)
    value = json.loads(reply.choices[0].message.content)
    assert reply.choices[0].finish_reason == "stop"
    assert set(value) == {"name", "age", "tags"}
    assert 0 <= value["age"] <= 150
    assert set(value["tags"]) <= {"a", "b"}


def test_json_object(client):
    schema = {"type": "json_object"}
    reply = ask(
        client, [{"role": "user", "content": "A person as JSON"}], response_format=schema, max_tokens=200, temperature=0
    )
    text = reply.choices[0].message.content
    assert text.startswith("{")
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"extra_body": {"priority": 5000}}, "priority"),
        ({"extra_body": {"priority": -1}}, "priority"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"extra_body": {"mirostat": 2}}, "mirostat"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 100}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "chat_template_kwargs"),
    ],
)
def test_wrong_and_unsupported_parameters_are_named(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **change)
    body = caught.value.body
    assert body["type"] == "invalid_request_error"
    if param is not None:
        assert str(body["param"]).startswith(param)
    assert re.search((param or "messages").split(".")[0], body["message"])


def test_biased_tokens_are_chosen_or_never(client):
    free = ask(client, STORY, temperature=0, max_tokens=12, logprobs=True, top_logprobs=1)
    forced = ask(client, STORY, temperature=0, max_tokens=4, logit_bias={"100": 100}, logprobs=True)
    assert len({token.token for token in forced.choices[0].logprobs.content}) == 1
    first = client.completions.create(model="demo", prompt=[5, 6], temperature=0, max_tokens=1, logprobs=0)
    ids = {str(token): -100.0 for token in range(1000)}
    other = client.completions.create(
        model="demo", prompt=[5, 6], temperature=0, max_tokens=1, logit_bias=ids, logprobs=0
    )
    assert first.choices[0].text != other.choices[0].text
    assert free.choices[0].logprobs.content[0].token != forced.choices[0].logprobs.content[0].token


def test_several_replies_read_their_prompt_once(client):
    """An unseen prompt; each reply gets tokens of its own."""
    story = [{"role": "user", "content": "Tell me a story about a lighthouse keeper who counts ships. " * 8}]
    before = client.completions.create(model="demo", prompt=[1, 2], max_tokens=1)
    assert before.usage is not None
    reply = ask(client, story, n=4, temperature=1, seed=5, max_tokens=10, extra_body={"priority": 1})
    assert len({choice.message.content for choice in reply.choices}) > 1
    experts = [r["hits"] + r["hits_ahead"] + r["misses"] for r in reply.usage.model_dump()["receipts"]]
    assert max(experts) > 0
    assert sorted(experts)[2] < max(experts) / 2  # one of them has read the prompt


def test_other_errors(client):
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        ask(client, model="gpt-9")
    with pytest.raises(openai.BadRequestError, match="context of 2048") as caught:
        ask(client, [{"role": "user", "content": "word " * 3000}])
    assert caught.value.code == "context_length_exceeded"
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").context_window == 2048
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
