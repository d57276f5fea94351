"""/v1/completions and /v1/responses with the openai client."""

import json

import openai
import pytest
from test_openai_chat import PERSON, WEATHER

FUNCTION = {"type": "function", **WEATHER["function"], "strict": True}


def complete(client, prompt, **changes):
    return client.completions.create(
        **({"model": "demo", "prompt": prompt, "max_tokens": 6, "temperature": 0} | changes)
    )


def test_text_and_token_prompts(client):
    reply = complete(client, ["Once upon a time", "The fox"], n=1)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.usage.completion_tokens == 12
    tokens = complete(client, [[100, 200, 300], [5, 6]])
    assert tokens.usage.prompt_tokens == 5
    assert complete(client, [100, 200, 300]).choices[0].text == tokens.choices[0].text
    assert complete(client, ["a", "b"], n=2, temperature=1).usage.prompt_tokens == 2
    with pytest.raises(openai.BadRequestError, match="token id 99999 is outside"):
        complete(client, [99999])
    with pytest.raises(openai.BadRequestError, match="prompt"):
        complete(client, [])
    with pytest.raises(openai.BadRequestError, match="80 replies are asked for at once, at most 72"):
        complete(client, ["x"] * 80)


def test_prompt_log_probabilities_as_evaluations_want_them(client):
    """The sum over a known continuation must be what the model says when it generates it."""
    free = complete(client, "Once upon a time", logprobs=1)
    text = "Once upon a time" + free.choices[0].text
    scored = complete(client, text, logprobs=1, echo=True, max_tokens=1)
    known = scored.choices[0].logprobs
    count = len(free.choices[0].logprobs.tokens)
    assert known.token_logprobs[0] is None
    assert known.token_logprobs[-count - 1 : -1] == pytest.approx(free.choices[0].logprobs.token_logprobs, abs=0.3)
    assert "".join(known.tokens) == scored.choices[0].text
    assert [scored.choices[0].text[at] for at in known.text_offset] == [token[0] for token in known.tokens]
    best = [max(top.values()) for top in known.top_logprobs[-count - 1 : -1]]
    assert known.token_logprobs[-count - 1 : -1] == best
    alone = complete(client, text, logprobs=1, echo=True, max_tokens=0)
    assert alone.choices[0].text == text
    assert alone.choices[0].logprobs.token_logprobs == known.token_logprobs[:-1]


def test_long_prompts_are_scored_in_pieces(client):
    ids = [(7 * i) % 1000 + 300 for i in range(300)]
    scored = complete(client, ids, logprobs=2, echo=True, max_tokens=1).choices[0].logprobs
    assert len(scored.tokens) == 301
    tail = complete(client, ids[:200], logprobs=2, echo=True, max_tokens=1).choices[0].logprobs
    assert scored.token_logprobs[1:200] == pytest.approx(tail.token_logprobs[1:200], abs=0.5)


def test_streamed_completion(client):
    whole = complete(client, "Once upon a time").choices[0].text
    chunks = list(complete(client, "Once upon a time", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole
    assert chunks[-1].usage.completion_tokens == 6
    echoed = complete(client, "Once upon a time", stream=True, echo=True)
    assert "".join(c.choices[0].text for c in echoed if c.choices) == "Once upon a time" + whole


def respond(client, given="Hello", **changes):
    return client.responses.create(
        **({"model": "demo", "input": given, "max_output_tokens": 60, "temperature": 0} | changes)
    )


def test_response_and_its_stream(client):
    whole = respond(client, instructions="Be brief.")
    assert whole.status == "completed"
    assert whole.output_text
    assert whole.usage.receipts[0]["new_tokens"] == whole.usage.output_tokens
    events = list(respond(client, instructions="Be brief.", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text
    cut = respond(client, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_response_with_a_call_and_its_result(client):
    question = [{"role": "user", "content": "Hello there"}]
    called = respond(
        client, question, tools=[FUNCTION], tool_choice="required", parallel_tool_calls=False, max_output_tokens=120
    )
    call = next(item for item in called.output if item.type == "function_call")
    assert set(json.loads(call.arguments)) == {"city", "unit"}
    history = [
        *question,
        *(item.model_dump() for item in called.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"},
    ]
    again = respond(client, history, tools=[FUNCTION])
    assert again.usage.input_tokens > called.usage.input_tokens
    events = list(
        respond(
            client,
            question,
            tools=[FUNCTION],
            tool_choice={"type": "function", "name": "get_weather"},
            stream=True,
            max_output_tokens=120,
        )
    )
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert set(json.loads("".join(pieces))) == {"city", "unit"}


def test_response_of_a_schema(client):
    wanted = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
    value = json.loads(respond(client, text=wanted, max_output_tokens=400, temperature=2).output_text)
    assert set(value) == {"name", "age", "tags"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "frob"}}}}, None),
    ],
)
def test_what_responses_do_not_have_is_named(client, change, param):
    with pytest.raises(openai.BadRequestError, match=param or "Invalid type: frob"):
        respond(client, **change)
