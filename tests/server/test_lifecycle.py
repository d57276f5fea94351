"""Queue, disconnects, metrics, settings, starting and stopping."""

import asyncio
import http.client
import json
import re
import signal
import socket
import threading
import time

import pytest
from server_process import SMALL, HttpServer, Server, running

from moestream import LLM
from moestream.engine.sampling import SamplingParams
from moestream.engine.sequence import Caller
from moestream.errors import CheckpointError
from moestream.server.run import serve
from moestream.server.service import Generation, Service
from moestream.server.settings import ServeSettings

KEY = {"x-api-key": "secret-key-1"}
LONG = {
    "model": "demo",
    "prompt": "Once upon a time",
    "max_tokens": 1900,
    "stream": True,
    "temperature": 0,
    "stop": ["\0"],
}


def gauge(server, name, headers=None):
    """A value of /metrics."""
    text = server.request("GET", "/metrics", headers=headers)[2]
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


def wait_for(condition):
    end = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def open_stream(server, body, headers=None):
    """A request whose reply has begun, as (connection, response)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"} | (headers or {})
    )
    return connection, connection.getresponse()


def test_full_queue_is_answered_429_and_a_disconnect_makes_room(narrow):
    """One runs and one waits; both end within a step of their clients' leaving."""
    first, reply = open_stream(narrow, LONG, KEY)
    assert reply.status == 200
    reply.readline()
    second, waiting = open_stream(narrow, LONG, KEY)
    assert waiting.status == 200
    wait_for(lambda: gauge(narrow, "moestream_waiting", KEY) == 1)
    refused, answer = open_stream(narrow, LONG, KEY)
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert json.loads(answer.read())["error"]["code"] == "queue_full"
    refused.close()
    start = len(narrow.lines)
    for connection, response in ((first, reply), (second, waiting)):
        response.close()
        connection.close()
    narrow.wait_line(r"POST /v1/completions 200 .*end=disconnected", start)
    wait_for(lambda: gauge(narrow, "moestream_running", KEY) == 0)
    assert gauge(narrow, "moestream_waiting", KEY) == 0
    again, answer = open_stream(narrow, LONG | {"max_tokens": 2, "stream": False}, KEY)
    assert answer.status == 200
    answer.close()
    again.close()
    assert not any("new=1900" in line for line in narrow.lines)


def test_disconnect_before_a_whole_answer(server):
    start = len(server.lines)
    body = json.dumps(LONG | {"stream": False, "n": 4}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: gauge(server, "moestream_running") == 4)
    server.wait_line(r"POST /v1/completions - .*end=disconnected", start)
    wait_for(lambda: gauge(server, "moestream_running") == 0)


def test_requests_share_steps_and_answers_stay_the_same():
    """In exact mode: fast activations may round a near tie the other way."""
    prompts = ["Once upon a time", "The fox", "A king", "In the sea"]
    together = {}
    with running("demo", "--port", "0", "--exact", *SMALL) as server:

        def ask(prompt):
            body = {"model": "demo", "max_tokens": 24, "temperature": 0, "prompt": prompt}
            return server.request("POST", "/v1/completions", body)[2]["choices"][0]["text"]

        alone = {p: ask(p) for p in prompts}
        threads = [threading.Thread(target=lambda p=p: together.update({p: ask(p)})) for p in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert together == alone


def test_a_silent_stream_gets_pings(narrow, server):
    """The second of two requests has to wait for the first."""
    del narrow
    connection, reply = open_stream(server, LONG | {"n": 8})
    waiting, late = open_stream(server, LONG | {"n": 1, "max_tokens": 1})
    assert late.readline() in (b": ping\n", b"")
    for one in (reply, late, connection, waiting):
        one.close()


def test_metrics(server):
    server.chat()
    assert gauge(server, "moestream_ready") == 1
    assert gauge(server, "moestream_generated_tokens_total") >= 8
    assert gauge(server, 'moestream_experts_total{tier="host"}') > 0
    assert gauge(server, 'moestream_read_bytes_total{source="disk"}') > 0
    assert gauge(server, "moestream_failed_reads_total") == 0
    assert gauge(server, 'moestream_ahead_bytes_total{use="used"}') >= 0
    assert gauge(server, "moestream_preemptions_total") == 0
    assert gauge(server, 'moestream_requests_total{path="/v1/chat/completions",status="200"}') >= 1
    assert gauge(server, "moestream_ttft_seconds_count") >= 1


def test_running_requests_may_finish_after_the_signal():
    with running("demo", "--port", "0", *SMALL) as server:
        connection, reply = open_stream(server, LONG | {"max_tokens": 300})
        reply.readline()
        server.process.send_signal(signal.SIGTERM)
        text = reply.read().decode()
        connection.close()
        assert text.rstrip().endswith("data: [DONE]")
        assert '"finish_reason": "length"' in text or '"finish_reason": "stop"' in text
        server.process.wait(30)
        assert not any("Traceback" in line for line in server.lines)


def test_what_runs_too_long_after_the_signal_is_told_so():
    with running("demo", "--port", "0", "--grace", "0.1", *SMALL) as server:
        connection, reply = open_stream(server, LONG | {"n": 8})
        reply.readline()
        server.process.send_signal(signal.SIGINT)
        text = reply.read().decode()
        connection.close()
        assert "shutting down" in text
        server.process.wait(30)
        assert not any("Traceback" in line for line in server.lines)


def test_file_environment_and_flags(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('model = "demo"\nport = 0\nname = ["file-name"]\nmax-batch = 2\nram = "1GB"\nqueue = 3\n')
    with running(
        "--config", str(file), "--name", "flag-name", "--name", "alias", env={"MOESTREAM_QUEUE": "0"}
    ) as server:
        names = [model["id"] for model in server.request("GET", "/v1/models")[2]["data"]]
        assert names == ["flag-name", "alias"]
        status, _, body = server.chat(model="alias", n=3)
        assert status == 400
        assert "at most 2 are possible" in body["error"]["message"]


def test_limits_of_requests():
    """A reply is cut at --max-tokens; a request that takes too long ends with 504, in a stream with an error event."""
    with running("demo", "--port", "0", "--max-tokens", "5", *SMALL) as server:
        status, _, body = server.chat(max_tokens=500, temperature=0)
        assert (status, body["usage"]["completion_tokens"]) == (200, 5)
    with running("demo", "--port", "0", "--request-timeout", "0.3", *SMALL) as server:
        status, _, body = server.request("POST", "/v1/completions", LONG | {"stream": False, "n": 8})
        assert (status, body["error"]["code"]) == (504, "timeout")
        connection, reply = open_stream(server, LONG | {"n": 8})
        text = reply.read().decode()
        connection.close()
        assert "--request-timeout" in text
        assert "[DONE]" not in text
        wait_for(lambda: gauge(server, "moestream_running") == 0)
        assert gauge(server, 'moestream_state_bytes{of="sequences"}') == 0


def test_a_request_that_has_ended_is_not_held_until_it_would_expire():
    async def end_one():
        generation = Generation(Service("demo", ServeSettings(), lambda: LLM("demo")))
        generation.expiry = asyncio.get_running_loop().call_later(3600, generation.expire)
        generation.add([1], SamplingParams(), None, Caller())
        assert not generation.expiry.cancelled()
        generation.close()
        assert generation.expiry.cancelled()

    asyncio.run(end_one())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--host", "0.0.0.0"], "set a key with --api-key"),
        (["--api-key", "short"], "at least 8"),
        (["--request-timeout", "0"], "above 0"),
        (["--config", "{folder}/none.toml"], "cannot be read"),
        (["--config", "{folder}/wrong.toml"], "unknown key 'prot'"),
        (["--allowed-origin", "example.org"], "is not an origin"),
        (["--port", "{port}"], "cannot listen"),
        (["/nowhere/model"], "nowhere"),
        (["demo", "--ram", "20MB"], "the memory budget is"),
    ],
)
def test_a_wrong_start_ends_with_one_line(args, message, tmp_path, server):
    (tmp_path / "wrong.toml").write_text("prot = 1\n")
    args = [a.format(folder=tmp_path, port=server.port) for a in args]
    if "--port" not in args:
        args += ["--port", "0"]
    failed = Server(*args)
    assert failed.process.wait(60) in (1, 2)
    failed.stop()
    text = "".join(failed.lines)
    assert message in text
    assert "Traceback" not in text


def test_while_loading_and_when_it_fails():
    """Before the model is there the server says so; when it cannot be loaded, its start ends with the reason."""
    go, failures = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    def load():
        go.wait(30)
        raise CheckpointError("there is nothing to load")

    def run():
        try:
            serve("models/nothing", ServeSettings(port=port), load, failures.append)
        except CheckpointError as error:
            failures.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        asked = HttpServer(port)
        status, _, body = wait_for(lambda: asked.try_request("GET", "/health"))
        assert (status, body["status"]) == (503, "loading")
        assert asked.request("GET", "/metrics")[0] == 200
        status, headers, body = asked.chat(model="nothing")
        assert (status, body["error"]["code"]) == (503, "loading")
        assert int(headers["retry-after"]) > 0
    finally:
        go.set()
        thread.join(30)
    assert failures == ["there is nothing to load"]


HOSTILE = """{%- if messages[0].content == 'loop' %}
{%- for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}
{%- elif messages[0].content == 'memory' %}{{ 'a' * 3000000000 }}
{%- elif messages[0].content == 'escape' %}{{ messages.__class__.__mro__ }}
{%- else %}{{ messages[0].content }}{% endif %}"""


def test_a_hostile_chat_template_ends_its_requests_alone(tmp_path):
    with LLM.load("demo", ram="1GB") as llm:
        demo = llm.runtime.folder
    for file in demo.iterdir():
        if file.is_file() and file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(HOSTILE)
    with running(str(tmp_path), "--name", "demo", "--port", "0", *SMALL) as server:
        for text in ("memory", "escape", "loop"):
            status, _, body = server.chat(messages=[{"role": "user", "content": text}])
            assert status == 400
            assert "chat template" in body["error"]["message"]
        assert server.chat()[0] == 200
