"""Many clients at once, some of whom leave early or read slowly: every reply is right, nothing is lost or leaks."""

import http.client
import json
import random
import re
import threading
import time
from pathlib import Path

import pytest
from server_process import running

STORIES = ["a fox", "a king and his ship", "two robots in the rain", "winter", "a lighthouse", "the last train home"]
FLAGS = ("--ram", "400MB", "--exact", "--max-decode-stall", "20", "--max-batch", "6", "--queue", "200")


def requests():
    """Bodies whose replies differ in length, API and shape."""
    found = []
    for i, story in enumerate(STORIES):
        question = [{"role": "user", "content": f"Tell me a story about {story}"}]
        found.append(("/v1/chat/completions", {"messages": question, "max_tokens": 20 + 15 * i}))
        found.append(
            ("/v1/completions", {"prompt": f"Once upon a time {story} " * (1 + 12 * (i % 3)), "max_tokens": 40})
        )
    return [(path, body | {"model": "demo", "temperature": 0}) for path, body in found]


def text_of(choice):
    return choice["text"] if "text" in choice else choice.get("delta", choice.get("message")).get("content") or ""


class Client(threading.Thread):
    """Sends requests until it is told to stop, and keeps what went wrong."""

    def __init__(self, server, expected, seed, until):
        super().__init__(daemon=True)
        self.server, self.expected, self.until = server, expected, until
        self.random = random.Random(seed)
        self.done, self.left, self.wrong = 0, 0, []

    def run(self):
        while self.until():
            case = self.random.randrange(len(self.expected))
            try:
                self.once(case, self.random.choice(["whole", "stream", "slow", "leave", "leave unread"]))
            except Exception as error:
                self.wrong.append((case, repr(error)))

    def once(self, case, manner):
        path, body = requests()[case]
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        try:
            data = json.dumps(body | {"stream": manner != "whole"})
            connection.request("POST", path, data, {"content-type": "application/json"})
            if manner == "leave unread":
                time.sleep(self.random.random() / 2)
                self.left += 1
                return
            reply = connection.getresponse()
            assert reply.status == 200, reply.read()
            text = text_of(json.loads(reply.read())["choices"][0]) if manner == "whole" else self.read(reply, manner)
            if text is None:
                self.left += 1
                return
            self.done += 1
            if text != self.expected[case]:
                self.wrong.append((case, text))
        finally:
            connection.close()

    def read(self, reply, manner):
        """The text of a stream; None if this client leaves in the middle."""
        text, lines = "", self.random.randrange(1, 12)
        for line in reply:
            if line.startswith(b"data: {"):
                data = json.loads(line[6:])
                assert "error" not in data, data
                text += text_of(data["choices"][0])
                lines -= 1
                if manner == "leave" and lines <= 0:
                    return None
                if manner == "slow":
                    time.sleep(0.03)
        return text


def gauges(server):
    text = server.request("GET", "/metrics")[2]
    return {m[1]: float(m[2]) for m in re.finditer(r"^(moestream_\S+) (\S+)$", text, re.MULTILINE)}


def resident(server, field="VmRSS"):
    """Bytes of the server's process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1])


def burden(server, clients, until):
    """Run clients; (replies compared, clients that left)."""
    expected = [text_of(server.request("POST", path, body)[2]["choices"][0]) for path, body in requests()]
    threads = [Client(server, expected, seed, until()) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert [wrong for thread in threads for wrong in thread.wrong] == []
    end = time.monotonic() + 30
    while (now := gauges(server))["moestream_running"] + now["moestream_waiting"] and time.monotonic() < end:
        time.sleep(0.05)
    assert now["moestream_running"] == now["moestream_waiting"] == 0
    assert now['moestream_state_bytes{of="sequences"}'] == 0
    assert not any("Traceback" in line for line in server.lines)
    return sum(t.done for t in threads), sum(t.left for t in threads)


def turns(count):
    """Makes conditions that hold so often."""

    def make():
        left = iter(range(count))
        return lambda: next(left, None) is not None

    return make


def test_load_for_a_moment():
    with running("demo", "--port", "0", *FLAGS) as server:
        done, _ = burden(server, 12, turns(3))
        assert done >= 6


@pytest.mark.slow
def test_fifty_clients_for_two_minutes():
    """Memory is compared after a warm-up, which fills slots, prefixes and the allocator's free lists."""
    with running("demo", "--port", "0", *FLAGS) as server:
        burden(server, 50, turns(3))
        warm = resident(server)
        end = time.monotonic() + 120
        done, left = burden(server, 50, lambda: lambda: time.monotonic() < end)
        print(f"\n{done} replies equal, {left} left; {warm} bytes resident before, {resident(server)} after")
        assert done > 200
        assert left > 50
        assert resident(server) < warm + (24 << 20)
        assert resident(server, "VmHWM") <= 400_000_000
