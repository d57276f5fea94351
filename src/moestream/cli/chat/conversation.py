"""A conversation and its files: saved under a name, and kept by itself so that the last one can be resumed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moestream.errors import ConfigError

FOLDER_VARIABLE = "MOESTREAM_CHATS"
"""Environment variable: another folder for conversations and the history of what was typed."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
MAX_BYTES = 64 << 20
"""Of a file that is loaded."""


class Message(BaseModel):
    """One message; what chat templates read of it, and how it ended."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant", "tool"]
    content: str
    name: str | None = None
    """Of a tool's result: the function."""
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    cut: str | None = None
    """Why a reply is not whole: ``cancelled`` or ``length``."""

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        return self.model_dump(exclude={"cut"}, exclude_none=True)


class Conversation(BaseModel):
    """What was said, and the settings it was said with."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["moestream-chat-1"] = "moestream-chat-1"
    model: str = ""
    system: str | None = None
    think: bool | None = None
    """Whether the model is told to think; None: as its template does."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Sampling that differs from the model's own."""
    messages: list[Message] = Field(default_factory=list)

    def for_template(self) -> list[dict[str, Any]]:
        """Every message, the system's first."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + [message.for_template() for message in self.messages]

    def last_question(self) -> int | None:
        """Index of the last message of the person."""
        return next((i for i in reversed(range(len(self.messages))) if self.messages[i].role == "user"), None)

    @property
    def title(self) -> str:
        """The beginning of what was asked first."""
        first = next((m.content for m in self.messages if m.role == "user"), "(empty)")
        line = " ".join(first.split())
        return line if len(line) <= 60 else line[:59] + "…"


class Chats:
    """Conversations on disk: ``NAME.json`` where they were saved, ``recent/TIME.json`` where they are kept anyway."""

    def __init__(self, root: Path | None = None, private: bool = False) -> None:
        """Nothing is created before something is written.

        Args:
            root: Folder; None: that of ``MOESTREAM_CHATS``, or of the user's data.
            private: Write nothing by itself.
        """
        given = os.environ.get(FOLDER_VARIABLE)
        self.root = root or (Path(given) if given else platformdirs.user_data_path("moestream") / "chats")
        self.private = private
        self._recent: Path | None = None  # of the conversation that goes on
        self._written: tuple[int, int] | None = None  # how it looked when we wrote it

    def begin(self) -> None:
        """The next ``keep`` is of another conversation."""
        self._recent = self._written = None

    def keep(self, conversation: Conversation) -> None:
        """Write down the conversation that goes on, unless it is empty.

        Raises:
            OSError: it cannot be written.
        """
        if self.private or not conversation.messages:
            return
        if self._recent is None or _state(self._recent) != self._written:  # another chat goes on in that file
            self._recent = _fresh(self.root / "recent")
        _write(self._recent, conversation)
        self._written = _state(self._recent)

    def resume(self) -> Conversation:
        """The conversation written last; it goes on in its file.

        Raises:
            ConfigError: there is none, or its file is damaged.
        """
        files = self._recent_files()
        if not files:
            raise ConfigError(f"there is no conversation to resume in {self.root / 'recent'}")
        conversation = _read(files[0])
        self._recent, self._written = files[0], _state(files[0])
        return conversation

    def save(self, name: str, conversation: Conversation, replace: bool = False) -> Path:
        """Save under a name.

        Raises:
            ConfigError: the name cannot be used.
            FileExistsError: another conversation has that name, which ``replace`` would lose.
            OSError: it cannot be written.
        """
        path = self._path(name)
        if path.exists() and not replace and not _begins_with(conversation, path):
            raise FileExistsError(path)
        _write(path, conversation)
        return path

    def load(self, name: str) -> Conversation:
        """Read what was saved under a name, or a recent conversation.

        Raises:
            ConfigError: there is none of that name, or its file is damaged.
        """
        path = self._path(name)
        recent = self.root / "recent" / path.name
        if not path.exists() and not recent.exists():
            raise ConfigError(f"there is no conversation {name!r}; /load alone lists them")
        return _read(path if path.exists() else recent)

    def names(self, recent: int = 10) -> list[str]:
        """Names that ``load`` takes: those saved, then the latest that were not."""
        saved = sorted(file.stem for file in self.root.glob("*.json"))
        return saved + [file.stem for file in self._recent_files()[:recent]]

    def _recent_files(self) -> list[Path]:
        """Latest first."""
        found = []
        for file in (self.root / "recent").glob("*.json"):
            with contextlib.suppress(OSError):
                found.append((file.stat().st_mtime_ns, file))
        return [file for _, file in sorted(found, reverse=True)]

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name for a conversation: letters, digits, '.', '_' and '-', at most 80")
        return self.root / f"{name}.json"


def private_folder(path: Path) -> Path:
    """Make a folder that only its owner can read."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def _fresh(folder: Path) -> Path:
    """A name that nobody else has, taken by an empty file."""
    name = time.strftime("%Y-%m-%d-%H%M%S")
    for number in range(1, 1000):
        path = private_folder(folder) / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            return path
    raise FileExistsError(folder / name)


def _state(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _write(path: Path, conversation: Conversation) -> None:
    """Replace a file whole or not at all; only its owner can read it."""
    temporary = private_folder(path.parent) / f".{path.name}.{os.getpid()}.tmp"
    text = json.dumps(conversation.model_dump(exclude_none=True), ensure_ascii=False, indent=1) + "\n"
    try:
        with open(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> Conversation:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes: it is no conversation")
        return Conversation.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path} is no conversation that can be loaded: {field}: {first['msg']}") from error


def _begins_with(conversation: Conversation, path: Path) -> bool:
    """Whether a file holds nothing but a beginning of a conversation."""
    try:
        there = _read(path).messages
    except ConfigError:
        return False
    return conversation.messages[: len(there)] == there
