"""Markdown while it grows: what is finished is given out once, what may still change is shown as long as it does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from rich import markdown
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.syntax import Syntax

Lines = list[list[Segment]]
NUMBER = re.compile(r"^(\s*)\d+")


class _Code(markdown.CodeBlock):
    """Code on the terminal's own background, indented."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        syntax = Syntax(code, self.lexer_name, theme="ansi_dark", word_wrap=True, background_color="default")
        lines = console.render_lines(syntax, options.update(width=max(1, options.max_width - 2)), pad=False)
        for line in lines:
            yield from (Segment("  "), *line, Segment.line())


class _Heading(markdown.Heading):
    """Every heading on the left."""

    LEVEL_ALIGN: ClassVar[dict[str, Any]] = {}


class _Markdown(markdown.Markdown):
    elements: ClassVar[dict[str, type[markdown.MarkdownElement]]] = {
        **markdown.Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
    }


class MarkdownStream:
    """Splits growing Markdown at its blocks and items of lists, and renders the pieces.

    A piece is finished when the line with which the next begins is complete. Code is given out by the line, too.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text = ""  # what is not finished
        self._given = 0  # lines of its code that were given out
        self._begun = False
        self._joined = False  # what comes next goes on with the list that was given out

    def push(self, text: str) -> None:
        """Read on."""
        self._text += text

    def take(self, room: int, final: bool = False) -> tuple[Lines, Lines]:
        """Lines that are finished since the last time, and the last ``room`` of those that may still change."""
        done: Lines = []
        while cut := self._cut(final):
            piece, self._text = self._text[:cut], self._text[cut:]
            done += self._rendered(_Markdown(piece, hyperlinks=False))[self._given :]
            self._begun, self._given = True, 0
            self._number(piece)
        if not self._text.strip():
            return done, []
        document = _Markdown(self._text, hyperlinks=False)
        rest = self._rendered(document)
        if final:
            return done + rest[self._given :], []
        is_code = [token.type for token in document.parsed] == ["fence"]
        if is_code and len(rest) - self._given > room:
            done += rest[self._given : len(rest) - room]
            self._given = len(rest) - room
        return done, rest[max(self._given, len(rest) - room) :]

    def _cut(self, final: bool) -> int:
        """Where the first finished piece ends; 0: there is none."""
        text = self._text if final else self._text[: self._text.rfind("\n") + 1]
        starts: list[int] = []  # lines
        kinds: list[str] = []
        for token in _Markdown(text).parsed:
            block = token.level == 0 and token.nesting >= 0
            item = token.level == 1 and token.type == "list_item_open" and kinds[-1:] != []
            if token.map is None or not (block or item):
                continue
            if item and kinds[-1].endswith("list_open"):
                kinds[-1] = "item"  # the list and its first item begin together
            else:
                starts.append(token.map[0])
                kinds.append("item" if item else token.type)
        if len(starts) < 2:
            return len(text) if final and text.strip() else 0
        self._joined_next = kinds[0] == kinds[1] == "item"
        return sum(len(line) + 1 for line in text.split("\n")[: starts[1]])

    def _number(self, piece: str) -> None:
        """An item keeps its number when it is rendered without those before it."""
        self._joined = bool(self._text.strip()) and self._joined_next
        found = NUMBER.match(piece)
        if self._joined and found is not None:
            self._text = NUMBER.sub(lambda m: f"{m[1]}{int(found[0]) + 1}", self._text, count=1)

    def _rendered(self, document: _Markdown) -> Lines:
        """Lines of a piece, with an empty one before it unless it goes on with a list."""
        lines = self._console.render_lines(document, pad=False)
        while lines and _empty(lines[0]):
            lines.pop(0)
        while lines and _empty(lines[-1]):
            lines.pop()
        return [[], *lines] if self._begun and not self._joined else lines


def _empty(line: Sequence[Segment]) -> bool:
    return not "".join(segment.text for segment in line).strip()
