"""Who may ask: host, origin, key, size; and bodies that no client would send."""

import http.client
import json
import re
import socket

import psutil
import pytest


def body_of(answer):
    status, _, body = answer
    return status, body["error"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:{port}", 200),
        ("127.0.0.1:{port}", 200),
        ("[::1]:{port}", 200),
        ("192.168.1.7", 200),
        ("evil.example.com", 403),
        ("evil.example.com:{port}", 403),
        ("127.0.0.1.evil.example.com", 403),
        ("", 403),
    ],
)
def test_only_known_hosts_are_served(server, host, status):
    answer = server.request("GET", "/v1/models", headers={"Host": host.format(port=server.port)})
    assert answer[0] == status


def test_pages_of_strangers_may_not_call(server, narrow):
    headers = {"Origin": "https://evil.example.com"}
    assert server.request("GET", "/health", headers=headers)[0] == 403
    assert server.request("GET", "/health", headers={"Origin": "null"})[0] == 403
    own = server.request("GET", "/health", headers={"Origin": server.url})
    assert own[0] == 200
    assert "access-control-allow-origin" not in own[1]
    allowed = {"Origin": "https://chat.example.org"}
    status, sent, _ = narrow.request("GET", "/health", headers=allowed)
    assert (status, sent["access-control-allow-origin"]) == (200, "https://chat.example.org")
    asking = allowed | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    status, sent, _ = narrow.request("OPTIONS", "/v1/messages", headers=asking)
    assert (status, sent["access-control-allow-headers"]) == (204, "x-api-key")
    assert server.request("OPTIONS", "/v1/messages", headers=asking)[0] == 403


def test_a_key_is_needed_in_either_form(narrow):
    assert narrow.request("GET", "/health")[0] == 200
    for path in ("/v1/models", "/metrics", "/v1/nowhere"):
        assert narrow.request("GET", path)[0] == 401
    status, error = body_of(narrow.chat())
    assert (status, error["code"]) == (401, "invalid_api_key")
    status, error = body_of(narrow.request("POST", "/v1/messages", {}, {"x-api-key": "wrong"}))
    assert (status, error["type"]) == (401, "authentication_error")
    for headers in ({"authorization": "Bearer secret-key-1"}, {"x-api-key": "secret-key-1"}):
        assert narrow.request("GET", "/v1/models", headers=headers)[0] == 200
    for headers in ({"authorization": "Bearer secret-key-2"}, {"authorization": "secret-key-1"}, {"x-api-key": "\xff"}):
        assert narrow.request("GET", "/v1/models", headers=headers)[0] == 401


def test_bodies_are_bounded(narrow):
    key = {"x-api-key": "secret-key-1"}
    status, error = body_of(narrow.request("POST", "/v1/messages", b" " * 20001, key))
    assert (status, error["type"]) == (413, "request_too_large")
    connection = http.client.HTTPConnection("127.0.0.1", narrow.port, timeout=30)
    pieces = (b" " * 5000 for _ in range(6))  # a body without a length
    connection.request(
        "POST", "/v1/completions", pieces, key | {"content-type": "application/json"}, encode_chunked=True
    )
    answer = connection.getresponse()
    assert answer.status == 413
    assert "20000" in json.loads(answer.read())["error"]["message"]
    connection.close()
    assert narrow.request("GET", "/v1/models", headers=key)[0] == 200


MALFORMED = {
    "no JSON": b"{",
    "no object": b"[1]",
    "empty": b"",
    "null": b"null",
    "not UTF-8": b'{"model": "demo", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "half a surrogate pair": b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "half a pair as a name": b'{"model": "demo", "\\ud800": 1, "messages": [{"role": "user", "content": "x"}]}',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000,
    "wrong types": b'{"model": 1, "messages": "hello"}',
    "NaN": b'{"model": "demo", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    "large number": b'{"model": "demo", "max_tokens": 1'
    + b"0" * 5000
    + b', "messages": [{"role": "user", "content": "x"}]}',
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bodies_are_errors_in_the_shape_of_the_api(server, path, name):
    status, headers, body = server.request("POST", path, MALFORMED[name])
    assert status == 400
    assert body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"
    assert (body.get("type") == "error") == (path == "/v1/messages")
    assert re.fullmatch(r"req_\w+", headers["x-request-id"])


HUGE = {
    "items of a wrong type": b'{"model": "demo", "prompt": [' + b"true," * 2_000_000 + b"true]}",
    "lists of a wrong type": b'{"model": "demo", "prompt": [' + b"[[]]," * 2_000_000 + b"[[]]]}",
    "unknown parameters": b"{" + b",".join(b'"a%d":0' % i for i in range(700_000)) + b"}",
    "a long text": b'{"model": "demo", "prompt": "' + b"a" * 20_000_000 + b'"}',
    "many tokens": b'{"model": "demo", "prompt": [' + b"1," * 1_000_000 + b"1]}",
}


@pytest.mark.parametrize("name", HUGE)
def test_large_bodies_do_not_fill_the_memory(server, name):
    before = psutil.Process(server.process.pid).memory_info().rss
    status, _, body = server.request("POST", "/v1/completions", HUGE[name])
    assert status == 400
    assert len(body["error"]["message"]) < 1000
    assert psutil.Process(server.process.pid).memory_info().rss - before < 1_500_000_000


def test_other_content_types_are_refused(server):
    """A page of a stranger can send text/plain without asking first."""
    body = b'{"model": "demo", "messages": [{"role": "user", "content": "x"}]}'
    status, _, answer = server.request("POST", "/v1/chat/completions", body, {"content-type": "text/plain"})
    assert status == 400
    assert "application/json" in answer["error"]["message"]


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(40),
        {"type": "object", "properties": {f"p{i}": {"type": "string", "description": "x" * 200} for i in range(1500)}},
        {"$ref": "#/definitions/none"},
        {"type": "string", "pattern": "("},
        {
            "anyOf": [
                {"type": "object", "properties": {f"p{i}{j}": {"type": "string"} for j in range(30)}} for i in range(80)
            ]
        },
        {"not": {"type": "object"}},
    ],
)
def test_schemas_that_cannot_be_enforced_are_refused(server, schema):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, error = body_of(server.chat(response_format=wanted))
    assert status == 400
    assert "schema" in error["message"]
    bad = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert server.chat(tools=[bad], tool_choice="required")[0] == 400


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "required": 5},
        {"type": "object", "required": [1]},
        {"type": "object", "properties": 3},
        {"type": "object", "properties": {"a": 3}},
        {"type": "object", "properties": {"a": {"type": "frob"}}},
    ],
)
def test_odd_schemas_of_tools_are_errors_of_the_request(server, parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    status, error = body_of(server.chat(tools=[tool], tool_choice="required"))
    assert status == 400
    assert error["message"]


@pytest.mark.parametrize("pattern", ["((a|b){1,1000}){1,1000}", "(a*)*b(.*x){20}", "(.{1,300}a){1,300}"])
def test_patterns_that_explode_end_in_bounded_time(server, pattern):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": pattern}}}
    assert server.chat(response_format=wanted, max_tokens=50)[0] in (200, 400, 500)
    assert server.chat()[0] == 200


def test_bytes_that_are_no_http(server):
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /" + b"x" * 100_000,
    ):
        with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
            raw.sendall(data)
            raw.settimeout(10)
            assert b" 4" in raw.recv(4096)[:20]
    assert server.request("GET", "/health")[0] == 200


def test_unknown_paths_and_methods(server):
    assert body_of(server.request("GET", "/v1/nowhere"))[0] == 404
    status, headers, body = server.request("GET", "/v1/messages")
    assert (status, body["error"]["type"], headers["allow"]) == (405, "invalid_request_error", "POST")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1, 2], "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 1}),
    ],
)
def test_only_an_operator_lets_requests_go_before_others(server, narrow, path, body):
    body = body | {"model": "demo"}
    key = {"authorization": "Bearer secret-key-1"}
    status, _, error = server.request("POST", path, body | {"priority": -1})
    assert status == 400
    assert error["error"]["param"] == "priority"
    assert "--allow-priority" in error["error"]["message"]
    assert server.request("POST", path, body | {"priority": 1})[0] == 200
    assert narrow.request("POST", path, body | {"priority": -1}, key)[0] == 200
