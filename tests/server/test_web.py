"""The page's files, and what it looks at; the page itself is tested in test_web_browser.py."""

import base64
import contextlib
import http.client
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moestream import LLM, SamplingParams, demo, stored_plan
from moestream.experts import activity
from moestream.server.activity import Activity
from moestream.server.live import probed_rate

LIVE = "/v1/moestream/live"
FILES = [
    "",
    "static/app.js",
    "static/style.css",
    "static/icon.svg",
    "static/vendor/marked.esm.js",
    "static/vendor/purify.es.mjs",
]
TYPES = ["text/html", "text/javascript", "text/css", "image/svg+xml", "text/javascript", "text/javascript"]


@pytest.mark.parametrize(("name", "kind"), list(zip(FILES, TYPES, strict=True)))
def test_files_are_served_with_their_types_and_a_strict_policy(server, name, kind):
    status, headers, text = server.request("GET", f"/{name}")
    assert status == 200
    assert headers["content-type"].split(";")[0] == kind
    assert text
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?:", policy)
    assert headers["x-content-type-options"] == "nosniff"
    again = server.request("GET", f"/{name}", headers={"if-none-match": headers["etag"]})
    assert again[0] == 304
    assert again[2] == ""
    head = server.request("HEAD", f"/{name}")
    assert (head[0], head[1]["content-length"], head[2]) == (200, str(len(text.encode())), "")


def test_everything_the_page_asks_for_is_here(server):
    """Nothing comes from elsewhere: every address in the page and its scripts is a file of the server."""
    names, seen = ["/"], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        status, _, text = server.request("GET", name)
        assert status == 200, name
        if name == "/":
            assert "<style" not in text
            assert not re.search(r"\son\w+=|\sstyle=", text)  # the policy would stop them
            names += re.findall(r'(?:src|href)="(/[^"]*)"', text)
        elif name.endswith("js"):
            folder = name.rsplit("/", 1)[0]
            names += [f"{folder}/{found}" for found in re.findall(r'^import .*from "\./([^"]+)"', text, re.MULTILINE)]
    assert len(seen) > 10


@pytest.mark.parametrize("name", ["static/", "static/nothing.js", "static/../web.py", "static/%2e%2e/web.py"])
def test_only_the_files_of_the_page_are_served(server, name):
    assert server.request("GET", f"/{name}")[0] == 404


def test_page_needs_no_key_and_the_view_does(narrow):
    assert narrow.request("GET", "/")[0] == 200
    assert narrow.request("GET", "/static/app.js")[0] == 200
    assert narrow.request("GET", LIVE)[0] == 401
    assert narrow.request("GET", LIVE, headers={"x-api-key": "secret-key-1"})[0] == 200


def cells_of(look):
    return np.frombuffer(base64.b64decode(look["cells"]), np.uint8)


def test_view_shows_what_a_request_did(server):
    before = server.request("GET", LIVE)[2]
    assert before["state"] == "ready"
    assert before["experts"] == [40] * 12
    status, _, reply = server.chat(max_tokens=12, seed=1)
    assert status == 200
    (receipt,) = reply["usage"]["receipts"]
    after = _settled(server, before)
    cells = cells_of(after)
    assert len(cells) == sum(after["experts"])
    resident = (cells & activity.RESIDENT) > 0
    assert 0 < resident.sum() <= after["slots"]
    assert not (cells & activity.READING).any()  # nothing runs
    used = (cells & activity.HEAT).reshape(12, 40) > 0
    assert (used.sum(axis=1) >= 6).all()  # the experts of a token, in every layer
    gained = {name: after["steps"][name] - before["steps"][name] for name in after["steps"]}
    assert gained["new_tokens"] == receipt["new_tokens"] - 1
    assert gained["prompt_tokens"] == pytest.approx(receipt["prompt_tokens"] - receipt["cached_tokens"])
    assert gained["step_seconds"] == pytest.approx(gained["read_seconds"] + gained["write_seconds"])
    asked = [after["store"][n] - before["store"][n] for n in ("hits", "hits_ahead", "misses")]
    assert sum(asked) == receipt["hits"] + receipt["hits_ahead"] + receipt["misses"]
    streaming = after["store"]["stream_seconds"] - before["store"]["stream_seconds"]
    stall = after["store"]["stall_seconds"] - before["store"]["stall_seconds"]
    assert 0 <= stall <= streaming <= gained["step_seconds"]
    assert after["prompt"] is None
    assert after["running"] == after["waiting"] == 0


def _settled(server, before):
    """A look taken after the last step has ended; looks are at least a fifth of a second old news."""
    while True:
        look = server.request("GET", LIVE)[2]
        if look["time"] > before["time"] and look["running"] == 0 and look["steps"] != before["steps"]:
            return look


def events_of(answer):
    for line in answer:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def test_stream_tells_what_changes(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", LIVE, headers={"accept": "text/event-stream"})
        answer = connection.getresponse()
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer)
        first = next(events)
        assert len(cells_of(first)) == sum(first["experts"])
        while "cells" in (quiet := next(events)):  # what an earlier test began may still end
            pass
        assert quiet["time"] > first["time"]
        asked = threading.Thread(target=server.chat, kwargs={"max_tokens": 60, "seed": 2})
        asked.start()
        while "cells" not in (busy := next(events)):
            pass
        assert busy["steps"]["step_seconds"] > quiet["steps"]["step_seconds"]
        asked.join()


def test_view_is_in_the_document(server):
    document = server.request("GET", "/openapi.json")[2]
    assert LIVE in document["paths"]
    assert "/" not in document["paths"]


def test_account_of_steps_holds_when_a_prompt_rests():
    """A long prompt that gives way to another's reply, layer by layer: nothing is counted twice, nothing lost."""
    with LLM.load("demo", ram="1GB", threads=1, prefix_cache=0, max_decode_stall=1) as llm:
        engine = llm.runtime.engine
        seen = Activity(engine)
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        writer = engine.add([5, 6, 7], params)
        while not writer.decoding:
            step(engine, seen)
        reader = engine.add(list(range(5, 405)), replace(params, max_tokens=2))
        progress = []
        while not reader.decoding:
            step(engine, seen)
            progress.append(seen.prompt())
        written = len(writer.tokens)
        assert written > 3  # the reply went on in between
        known = [reading for reading in progress if reading is not None]
        assert known == sorted(known)
        assert {total for _, total in known} == {400}
        assert len(set(known)) > 3
        while not engine.idle:
            step(engine, seen)
    totals = seen.totals()
    assert totals.prompt_tokens == pytest.approx(403)
    assert totals.new_tokens == 39 + 1  # all but the first of each
    assert 0 < totals.read_seconds < totals.step_seconds
    assert 0 < totals.write_seconds < totals.step_seconds
    assert seen.prompt() is None


def step(engine, seen):
    seen.begin_step()
    engine.step()
    seen.end_step()


@pytest.mark.parametrize(
    ("measured", "rate"),
    [
        ({"candidates": [{"turns": [{"disk": 2e9}, {"disk": 3e9}]}, {"turns": [{"disk": 1e9}]}]}, 3e9),
        ({"candidates": []}, 0.0),
        ({"candidates": [{"turns": [{"disk": "fast"}]}]}, 0.0),
        ({}, 0.0),
    ],
)
def test_ceiling_of_the_disk_is_the_best_probe_of_a_stored_plan(tmp_path, monkeypatch, measured, rate):
    monkeypatch.setenv(stored_plan.FOLDER_VARIABLE, str(tmp_path))
    folder = Path(demo.__path__[0])
    assert probed_rate(folder) == (0.0, "")
    fingerprint = stored_plan.model_fingerprint(folder)
    machine = stored_plan.machine_fingerprint()
    plan = stored_plan.StoredPlan("arena", 10, 1 << 30, "2026-11-23T20:00:00+00:00", machine, fingerprint, measured)
    stored_plan.save(folder, plan)
    assert probed_rate(folder) == (rate, "2026-11-23" if rate else "")
