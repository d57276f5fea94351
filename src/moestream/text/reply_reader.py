"""Read a reply while it is written: what the model thinks, what it says, which functions it calls.

The pieces put together are what ``parse_reply`` finds in the whole reply, except that a call whose arguments turn out
to be malformed after its name has been passed on stays a call, with the arguments as the model wrote them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from moestream.text.tokenizer import overlap
from moestream.text.tool_formats import CallReader, ToolFormat, Tools

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of what the model says."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The model calls a function."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments, a JSON object as text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The arguments are complete, or the reply has ended."""

    index: int


Event = Reasoning | Content | CallStart | CallArguments | CallEnd


@dataclass(slots=True)
class Call:
    """A function call; ``arguments`` is JSON as text."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Gathered:
    """Events put together."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> None:
        """Take more events."""
        for event in events:
            match event:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.content += text
                case CallStart(_, name):
                    self.calls.append(Call(name))
                case CallArguments(index, text):
                    self.calls[index].arguments += text


class ReplyReader:
    """Reader of one reply."""

    def __init__(self, form: ToolFormat | None = None, tools: Tools = (), in_thought: bool = False) -> None:
        """Begin a reply.

        Args:
            form: How calls are written; None: there are none, whatever the text looks like.
            tools: Schemas of the functions.
            in_thought: The prompt already ended with ``<think>``.
        """
        self._form = form
        self._tools = tools
        self._state: Literal["start", "thought", "content", "call"] = "thought" if in_thought else "start"
        self._held = ""
        self._space = ""  # white space that is left out if it turns out to be at an end
        self._begun = False  # the text of this state has begun
        self._thought = in_thought
        self._call: CallReader | None = None
        self._body = ""
        self._named = False
        self._calls = 0

    @property
    def thinking(self) -> bool:
        """Whether the reply still thinks."""
        return self._state == "thought"

    def push(self, text: str) -> list[Event]:
        """Read on."""
        self._held += text
        return self._read(final=False)

    def finish(self) -> list[Event]:
        """The reply has ended."""
        events = self._read(final=True)
        if self._state == "call":
            events += self._end_call(closed=False)
        elif self._state == "content" and self._space and not self._thought and not self._calls:
            events.append(Content(self._space))
        return events

    def _read(self, final: bool) -> list[Event]:
        events: list[Event] = []
        steps = {"start": self._start, "thought": self._think, "content": self._say, "call": self._read_call}
        while steps[self._state](events, final):
            pass
        return events

    def _start(self, events: list[Event], final: bool) -> bool:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held, self._thought = text.removeprefix(THINK), True
            self._state = "thought"
        elif not final and THINK.startswith(text):
            return False
        else:
            self._state = "content"
        return True

    def _think(self, events: list[Event], final: bool) -> bool:
        text, found = self._until(END_THINK, final)
        if text := self._trimmed(text, leading=False):
            events.append(Reasoning(text))
        if found:
            self._state, self._space, self._begun = "content", "", False
        return found

    def _say(self, events: list[Event], final: bool) -> bool:
        text, found = (self._held, False) if self._form is None else self._until(self._form.opening, final)
        if self._form is None:
            self._held = ""
        if text := self._trimmed(text, leading=not self._thought):
            events.append(Content(text))
        if found:
            assert self._form is not None
            self._state, self._call, self._body, self._named = "call", self._form.reader(self._tools), "", False
        return found

    def _read_call(self, events: list[Event], final: bool) -> bool:
        assert self._form is not None
        assert self._call is not None
        text, found = self._until(self._form.closing, final)
        self._body += text
        events += self._call_events(self._call.push(text))
        if found:
            events += self._end_call(closed=True)
            self._state = "content"
        return found

    def _call_events(self, arguments: str) -> list[Event]:
        """What more of the arguments means; the first of it comes after the name."""
        assert self._call is not None
        events: list[Event] = []
        if self._call.name is not None and not self._named:
            self._named = True
            self._calls += 1
            events.append(CallStart(self._calls - 1, self._call.name))
        if arguments:
            events.append(CallArguments(self._calls - 1, arguments))
        return events

    def _end_call(self, closed: bool) -> list[Event]:
        assert self._form is not None
        assert self._call is not None
        events = self._call_events(self._call.finish()) if closed else []
        if self._named:
            return [*events, CallEnd(self._calls - 1)]
        body = self._form.opening + self._body + (self._form.closing if closed else "")
        return [Content(self._trimmed(body, leading=True))]

    def _until(self, marker: str, final: bool) -> tuple[str, bool]:
        """Take what certainly stands before a marker, and the marker if it is there."""
        text, found, rest = self._held.partition(marker)
        if not found:
            keep = 0 if final else overlap(text, marker)
            text, rest = text[: len(text) - keep], text[len(text) - keep :]
        self._held = rest
        return text, bool(found)

    def _trimmed(self, text: str, leading: bool) -> str:
        """A piece of text with the white space at its end held back until more text follows."""
        text = self._space + text
        if not self._begun and not leading:
            text = text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        self._begun = self._begun or bool(body)
        return body
