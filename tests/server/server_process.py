"""``moestream serve`` as a process, and plain HTTP to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

READY = re.compile(r"is ready at http://[^ ]*:(\d+)/v1")


class HttpServer:
    """Something that listens on a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body=None, headers=None):
        """(status, headers, parsed body) of one request, sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            sent = {"content-type": "application/json"} if data is not None else {}
            connection.request(method, path, data, sent | (headers or {}))
            answer = connection.getresponse()
            text = answer.read()
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.status, answer.headers, json.loads(text) if is_json else text.decode()

    def chat(self, **changes):
        """(status, headers, body) of a small chat completion."""
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8} | changes
        return self.request("POST", "/v1/chat/completions", body)

    def try_request(self, method: str, path: str):
        """As ``request``; None while nothing listens yet."""
        try:
            return self.request(method, path)
        except ConnectionError:
            return None


class Server(HttpServer):
    """``moestream serve`` in a process."""

    def __init__(self, *args: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "moestream", "serve", *args]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MOESTREAM_") or k == "MOESTREAM_ISA"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=kept | (env or {}))
        self.lines: list[str] = []
        self.changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                with self.changed:
                    self.lines.append(line)
                    self.changed.notify_all()
        with self.changed:
            self.lines.append("")  # the process has ended
            self.changed.notify_all()

    def wait_line(self, pattern: str, start: int = 0) -> re.Match[str]:
        """Wait until a line of the log, from ``start`` on, matches."""

        def found() -> re.Match[str] | bool | None:
            match = next((m for line in self.lines[start:] if (m := re.search(pattern, line))), None)
            return match or ("" in self.lines)

        with self.changed:
            assert self.changed.wait_for(found, 60), f"{pattern} not in {self.lines}"
            match = found()
        assert isinstance(match, re.Match), self.lines
        return match

    @property
    def port(self) -> int:  # type: ignore[override]  # known when it is ready
        return int(self.wait_line(READY.pattern)[1])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self._reader.join(30)


@contextlib.contextmanager
def running(*args: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    server = Server(*args, env=env)
    try:
        yield server
    finally:
        server.stop()


SMALL = ("--ram", "1GB", "--threads", "1")
