"""What the person sees while a reply is written: plain text, or Markdown with a line about the machine below it."""

from __future__ import annotations

import contextlib
import sys
import termios
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from moestream.cli.chat.markdown import Lines, MarkdownStream
from moestream.cli.output import note
from moestream.text.reply_reader import CallArguments, CallStart, Content, Event, Reasoning

if TYPE_CHECKING:
    from moestream.experts.stats import StoreStats

THOUGHT_LINES = 6
"""Lines of what the model thinks that are shown meanwhile."""
REFRESH_SECONDS = 0.1
RATE_SECONDS = 3.0
"""Time over which the live rate is taken."""


_SHOWN = {c: f"<U+{c:04X}>" for c in (*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_SHOWN |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def visible(text: str) -> str:
    """A text that cannot steer the terminal or hide what it says: control and direction characters are spelt out."""
    return text.translate(_SHOWN)


@dataclass(slots=True)
class Meter:
    """How fast a reply is written and what the expert cache did for it."""

    before: StoreStats
    now: StoreStats
    tokens: int = 0
    times: deque[float] = field(default_factory=deque)

    def add(self, tokens: int, stats: StoreStats) -> None:
        """A step has ended."""
        self.tokens += tokens
        self.now = stats
        now = time.perf_counter()
        self.times.extend([now] * tokens)
        while len(self.times) > 2 and self.times[0] < now - RATE_SECONDS:
            self.times.popleft()

    def text(self) -> str:
        """Rate, hits and tokens in words."""
        did = self.now - self.before
        facts = []
        if len(self.times) > 1 and self.times[-1] > self.times[0]:
            facts.append(f"{(len(self.times) - 1) / (self.times[-1] - self.times[0]):.1f} tok/s")
        if did.hits + did.hits_ahead + did.misses:
            facts.append(f"{100 * did.hit_rate:.0f} % hits")
        return " · ".join([*facts, f"{self.tokens} tokens"])


class View(Protocol):
    """One reply on its way."""

    def reading(self, done: int, total: int) -> None:
        """The prompt is being read."""

    def show(self, events: list[Event], meter: Meter) -> None:
        """The reply goes on."""

    def thought(self, seconds: float, tokens: int) -> None:
        """The model has stopped thinking."""

    def close(self) -> None:
        """The reply has ended."""


class PlainView:
    """Text as it comes on stdout; all else on stderr."""

    def __init__(self) -> None:
        self._wrote = self._thinking = False

    def reading(self, done: int, total: int) -> None:
        """Nothing: the output may be read by a program or aloud."""

    def show(self, events: list[Event], meter: Meter) -> None:
        """Write what the model says."""
        for event in events:
            match event:
                case Reasoning() if not self._thinking:
                    self._thinking = True
                    note("[thinking]")
                case Content(text):
                    self._wrote = True
                    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
                    sys.stdout.flush()
                case _:
                    pass

    def thought(self, seconds: float, tokens: int) -> None:
        """Say how long."""
        note(f"[thought for {seconds:.1f} s ({tokens} tokens)]")

    def close(self) -> None:
        """End the line."""
        if self._wrote:
            print(flush=True)


class RichView:
    """Markdown: finished blocks scroll up as ordinary output, the unfinished one and the meter stay below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._markdown = MarkdownStream(console)
        self._rest: Lines = []
        self._thinking = ""
        self._calls = ""
        self._status = "reading the prompt"
        self._due = 0.0
        self._live = Live(
            console=console,
            get_renderable=lambda: self,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def reading(self, done: int, total: int) -> None:
        """Say how far the prompt has been read."""
        self._status = f"reading the prompt: {100 * done // max(1, total)} %"
        self._refresh()

    def show(self, events: list[Event], meter: Meter) -> None:
        """Read on."""
        doing = ""
        for event in events:
            match event:
                case Reasoning(text):
                    self._thinking += visible(text)
                case Content(text):
                    self._markdown.push(visible(text))
                case CallStart(_, name):
                    self._calls = f"calls {visible(name)} "
                case CallArguments(_, text):
                    self._calls += visible(text)
                case _:
                    pass
        doing = "thinking · " if self._thinking else ""
        self._status = f"{doing}{meter.text()} · Ctrl-C stops"
        self._refresh()

    def thought(self, seconds: float, tokens: int) -> None:
        """Fold what it thought into a line."""
        self._thinking = ""
        line = Text(f"▸ thought for {seconds:.1f} s ({tokens} tokens; /show thinking)", style="dim")
        self._live.console.print(line)
        self._live.console.print()

    def close(self) -> None:
        """Leave the reply alone on the screen."""
        self._thinking = self._calls = self._status = ""
        done, self._rest = self._markdown.take(self._room, final=True)
        self._print(done)
        self._live.stop()

    @property
    def _room(self) -> int:
        """Lines for what may still change."""
        return max(1, self._console.height - 3)

    def _refresh(self) -> None:
        began = time.perf_counter()
        if began < self._due:
            return
        done, self._rest = self._markdown.take(self._room)
        if done:
            self._print(done)  # repaints what is below it, too
        else:
            self._live.refresh()
        ended = time.perf_counter()
        self._due = ended + max(REFRESH_SECONDS, 10 * (ended - began))  # at most a tenth of the time for looks

    def _print(self, lines: Lines) -> None:
        if lines:
            self._live.console.print(_Lines(lines))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What stays below the finished blocks."""
        if not self._status:
            return
        yield from _Lines(self._rest).__rich_console__(console, options)
        for text, room in ((self._thinking, THOUGHT_LINES), (self._calls, 2)):
            if text:
                lines = Text(text[-4000:], style="dim italic").wrap(console, options.max_width)
                yield from lines[-min(room, self._room) :]
        status = Text(self._status, style="dim", no_wrap=True, overflow="crop")
        status.truncate(options.max_width)
        yield status


@dataclass(frozen=True, slots=True)
class _Lines:
    """Lines that are rendered already."""

    lines: Lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield from line
            yield Segment.line()


class Screen:
    """Makes views and says things, in one of the two ways."""

    def __init__(self, plain: bool) -> None:
        self.plain = plain
        self._console = Console(highlight=False)

    @contextlib.contextmanager
    def reply(self) -> Iterator[View]:
        """The view of one reply; what is typed meanwhile does not show."""
        if self.plain:
            view: View = PlainView()
        else:
            view = RichView(self._console)
        with no_echo():
            try:
                yield view
            finally:
                view.close()

    def say(self, text: str) -> None:
        """Something of the program's own."""
        if self.plain:
            note(visible(text))
        else:
            self._console.print(Text(visible(text), style="dim"))

    def call(self, text: str) -> None:
        """A function that may run."""
        if self.plain:
            note(visible(text))
        else:
            self._console.print(Text(visible(text), style="bold"))

    def warn(self, text: str) -> None:
        """Something went wrong."""
        if self.plain:
            note(f"moestream: {visible(text)}")
        else:
            self._console.print(Text(f"moestream: {visible(text)}", style="red"))

    def text(self, text: str) -> None:
        """Something that was asked for, as it is."""
        if self.plain:
            print(visible(text) if sys.stdout.isatty() else text, flush=True)
        else:
            self._console.print(Text(visible(text)), soft_wrap=True)


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """Keys are kept for the next prompt, but do not show in what is drawn meanwhile."""
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(fd, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
