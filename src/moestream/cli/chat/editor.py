"""Where the person writes: an editor line with history and completion on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import termios
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moestream.cli.chat.conversation import private_folder
from moestream.cli.chat.screen import Screen, visible
from moestream.cli.chat.session import Consent
from moestream.cli.output import note
from moestream.errors import ConfigError
from moestream.text.tools import ToolCall

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

QUOTES = '"""'


class Editor(Protocol):
    """Asks for messages."""

    def message(self, draft: str = "") -> str:
        """The next message, which ``draft`` may begin.

        Raises:
            EOFError: there are no more.
            KeyboardInterrupt: Ctrl-C.
        """

    def answer(self, question: str) -> str:
        """The answer to a question about something that must not happen by accident; empty: none.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """


def unfinished(text: str) -> bool:
    """Whether more lines belong to a message: its quotation of three marks is open, or it ends with a backslash."""
    quoted = text.strip().removeprefix("/set system").lstrip()
    is_open = quoted.startswith(QUOTES) and not quoted.removeprefix(QUOTES).endswith(QUOTES)
    return is_open or (text.endswith("\\") and not text.endswith("\\\\"))


def joined(text: str) -> str:
    """A message without the marks that held its lines together."""
    text = text.replace("\\\n", "\n")
    bare = unquoted(text)
    return text if bare is None else bare


def unquoted(text: str) -> str | None:
    """What stands between three quotation marks; None when the text is not in them."""
    text = text.strip()
    if text.startswith(QUOTES) and text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES):
        return text[len(QUOTES) : -len(QUOTES)].strip("\n")
    return None


class PlainEditor:
    """Lines of stdin; the prompt is written to stderr, and only where a person reads it."""

    def __init__(self) -> None:
        self._terminal = sys.stdin.isatty()

    def message(self, draft: str = "") -> str:
        """The next message; a draft is only shown, it has to be written again."""
        text = self._line("> ")
        while unfinished(text):
            try:
                text += "\n" + self._line("... ")
            except EOFError:
                break
        return joined(text)

    def answer(self, question: str) -> str:
        """Nobody answers through a pipe."""
        if not self._terminal:
            return ""
        forget_keys()
        with contextlib.suppress(EOFError):
            return self._line(question)
        return ""

    def _line(self, prompt: str) -> str:
        if self._terminal:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ConfigError(f"stdin is not text: {error}") from error
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class RichEditor:
    """Several lines with history, search, completion of commands, and a line below about the conversation."""

    def __init__(self, history: Path | None, words: Callable[[str], Iterable[str]], toolbar: Callable[[], str]) -> None:
        """Prepare the editor.

        Args:
            history: File of what was typed; None: it is forgotten at the end.
            words: What may complete a command that was begun.
            toolbar: Says how things stand.
        """
        from prompt_toolkit import PromptSession  # noqa: PLC0415

        self._session: PromptSession[str] = PromptSession(
            history=_history(history),
            multiline=True,
            key_bindings=_keys(),
            completer=_completer(words),
            prompt_continuation=lambda width, _line, _wrapped: " " * width,
            bottom_toolbar=lambda: visible(toolbar()),
            complete_while_typing=True,
            reserve_space_for_menu=5,
        )
        self._questions: PromptSession[str] = PromptSession()

    def message(self, draft: str = "") -> str:
        """The next message."""
        return joined(self._session.prompt("> ", default=draft))

    def answer(self, question: str) -> str:
        """A line that is not remembered."""
        from prompt_toolkit.input.typeahead import clear_typeahead  # noqa: PLC0415

        forget_keys()
        clear_typeahead(self._questions.app.input)  # what came together with the last message
        with contextlib.suppress(EOFError):
            return self._questions.prompt(question)
        return ""


class Asked(Consent):
    """Shows each call and asks before it runs."""

    def __init__(self, editor: Editor, screen: Screen, always: bool = False) -> None:
        """Ask with an editor.

        Args:
            editor: Asks.
            screen: Shows the call.
            always: Do not ask at all.
        """
        self._editor = editor
        self._screen = screen
        self._always = always
        self._allowed: set[str] = set()

    def __call__(self, call: ToolCall) -> bool:
        """Whether the person allows a call; no answer is no."""
        rows = [f"  {_key(key)} = {json.dumps(value, ensure_ascii=False)}" for key, value in call.arguments.items()]
        self._screen.call("\n".join([f"call {call.name}(", *rows, ")"]) if rows else f"call {call.name}()")
        if self._always or call.name in self._allowed:
            return True
        for _ in range(3):
            match self._editor.answer("run it? [y]es / [N]o / [a]lways this function: ").strip().lower():
                case "y" | "yes":
                    return True
                case "a" | "always":
                    self._allowed.add(call.name)
                    return True
                case "" | "n" | "no":
                    return False
        return False


def _key(key: str) -> str:
    return key if key.isidentifier() else json.dumps(key)


def forget_keys() -> None:
    """Drop what was typed ahead: it was no answer to a question not yet asked."""
    with contextlib.suppress(OSError, ValueError, termios.error):
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)


def _history(path: Path | None) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory  # noqa: PLC0415

    if path is None:
        return InMemoryHistory()
    try:
        private_folder(path.parent)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError as error:
        note(f"moestream: warning: what is typed will not be remembered: {error}")
        return InMemoryHistory()
    return FileHistory(path)


def _completer(words: Callable[[str], Iterable[str]]) -> Completer:
    from prompt_toolkit.completion import Completer, Completion  # noqa: PLC0415

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            if text.startswith("/") and "\n" not in text:
                head, _, last = text.rpartition(" ")
                for word in words(head):
                    if word.startswith(last):
                        yield Completion(word, -len(last))

    return Commands()


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings  # noqa: PLC0415

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
