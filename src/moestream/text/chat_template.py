"""Chat templates: messages to the text a model was trained on, with the template kept in a box.

A template is a program by a stranger. It runs in a process of its own (``template_worker.py``) under limits of wall
time, memory and output, and the process is killed and replaced when it exceeds one. It stays warm between renders.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from moestream.errors import CheckpointError, RequestError, TemplateError
from moestream.text.tokenizer import MAX_JSON_BYTES, read_json, special_token

WORKER = Path(__file__).with_name("template_worker.py")
MAX_TEMPLATE_BYTES = 1 << 20
START_SECONDS = 30.0
PROCESS = "the process that renders chat templates"
WATCH_SECONDS = 0.02
"""Time between two looks at the worker's memory."""
KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
"""All that the worker sees of the environment: no tokens or keys."""
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"})


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one render may take."""

    seconds: float = 5.0
    memory: int = 512 << 20
    """Bytes of the whole worker process (about 60 MB of them are Python itself)."""
    output: int = 16 << 20
    """Characters."""


class _Worker:
    """A running worker process; not thread-safe."""

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", str(WORKER), str(limits.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C in the terminal is not for the worker
        )
        self._ready = False
        self._unread = bytearray()
        self._end = weakref.finalize(self, _kill, self._process)

    def close(self) -> None:
        """Kill the process."""
        self._end()

    def render(self, template: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            TemplateError: a limit was exceeded or the worker died; it must be replaced.
        """
        if not self._ready:
            self._receive(START_SECONDS)
            self._ready = True
        seconds, output = self._limits.seconds, self._limits.output
        request = {"template": template, "variables": variables, "seconds": seconds, "output": output}
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
        except OSError as error:
            raise TemplateError(f"{PROCESS} is gone: {error}") from error
        return self._receive(seconds)

    def _receive(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        stream = self._process.stdout
        assert stream is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._unread[-1:]:  # one answer a line, and nothing after it
                if not selector.select(WATCH_SECONDS):
                    self._watch(end, seconds)
                    continue
                data = os.read(stream.fileno(), 1 << 20)
                if not data and not self._ready:
                    raise TemplateError(
                        f"{PROCESS} ended at once; this shows why: {sys.executable} {WORKER} 1000000000"
                    )
                if not data:
                    raise TemplateError("the chat template brought its process down (memory, or too deep a nesting)")
                self._unread += data
                if len(self._unread) > 12 * self._limits.output:  # JSON writes a character in at most 12 bytes
                    raise TemplateError(f"the chat template wrote more than {self._limits.output} characters")
        line, self._unread = self._unread, bytearray()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _watch(self, end: float, seconds: float) -> None:
        if time.monotonic() > end and not self._ready:
            raise TemplateError(f"{PROCESS} is not ready after {seconds:g} s: the machine is busy, try again")
        if time.monotonic() > end:
            raise TemplateError(f"the chat template ran longer than {seconds:g} s")
        try:
            resident = psutil.Process(self._process.pid).memory_info().rss
        except psutil.Error:
            return  # it died: the next read says so
        if resident > self._limits.memory:
            raise TemplateError(f"the chat template took more than {self._limits.memory} bytes of memory")


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # a request that could not be written any more
                stream.close()


class ChatTemplate:
    """The chat templates of a model folder. Thread-safe."""

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        limits: TemplateLimits | None = None,
    ) -> None:
        self._templates = dict(templates)
        self._special = dict(special_tokens or {})
        self._limits = limits or TemplateLimits()
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    @classmethod
    def load(cls, folder: Path, limits: TemplateLimits | None = None) -> ChatTemplate | None:
        """Find the templates of a model folder; None when it has none (a base model).

        Raises:
            CheckpointError: a file is malformed.
        """
        config = read_json(folder / "tokenizer_config.json")
        templates = _from_config(config.get("chat_template"), folder / "tokenizer_config.json")
        other = folder / "chat_template.json"  # as processors of multimodal models store it
        templates |= _from_config(read_json(other).get("chat_template"), other)
        path = folder / "chat_template.jinja"
        if path.is_file():
            if path.stat().st_size > MAX_TEMPLATE_BYTES:
                raise CheckpointError(f"{path} has more than {MAX_TEMPLATE_BYTES} bytes")
            try:
                templates["default"] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path} is not UTF-8 text: {error}") from error
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: text for name in names if (text := special_token(config, name)) is not None}
        return cls(templates, special, limits) if templates else None

    @property
    def source(self) -> str:
        """The text of all templates: what they mention tells what the model was trained on."""
        return "\n".join(self._templates.values())

    def warm(self) -> None:
        """Start the worker without waiting for it."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """Stop the worker; a later render starts a new one."""
        with self._lock:
            self._stop()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Text of a conversation, up to where the assistant's reply begins.

        Args:
            messages: Objects with ``role`` and ``content``, and whatever else the template reads.
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: End with the start of the assistant's turn.
            variables: Further variables of the template, such as ``enable_thinking``.

        Raises:
            RequestError: the messages or variables are malformed.
            TemplateError: the template failed, takes no tools, or exceeded a limit.
        """
        for name in variables:
            if name in RESERVED:
                raise RequestError(f"template variable {name!r} is reserved")
        known = {
            **self._special,
            **variables,
            "messages": _checked(messages),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            size = len(json.dumps(known))
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages, tools and template variables must be plain JSON values: {error}") from error
        if size > MAX_JSON_BYTES:
            raise RequestError(f"messages and tools have {size} bytes, more than {MAX_JSON_BYTES}")
        with self._lock:
            try:
                answer = self._start().render(self._choose(bool(tools)), known)
            except BaseException:
                self._stop()  # an interrupted worker would answer the wrong question next time
                raise
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])

    def _choose(self, tools: bool) -> str:
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            names = ", ".join(sorted(self._templates))
            raise TemplateError(f"the model has no default chat template, only: {names}")
        return self._templates["default"]

    def _start(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker(self._limits)
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _from_config(value: Any, path: Path) -> dict[str, str]:
    """Templates as ``tokenizer_config.json`` stores them: one string, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in value
    ):
        return {entry["name"]: entry["template"] for entry in value}
    raise CheckpointError(f"{path}: chat_template must be a string or a list of objects with name and template")


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not messages:
        raise RequestError("messages must be a non-empty list of objects with role and content")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] must be an object with a role, such as user")
        if not isinstance(message.get("content"), str | list | None):
            raise RequestError(f"messages[{index}].content must be text, a list of parts, or null")
    return [_with_objects(message) for message in messages]


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its tool calls as objects: APIs send JSON text, templates read objects."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        return dict(message)
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_object(call["function"])}
    try:
        arguments = json.loads(call.get("arguments", ""))
    except (TypeError, ValueError, RecursionError):
        return dict(call)  # already an object, or text that is the template's affair
    return {**call, "arguments": arguments}
