"""Text to token ids and back, one token at a time.

The work is done by ``tokenizers`` (``tokenizer.json``); this module adds what a stream needs: characters are never
cut, and text that may turn out to be the start of a stop string is held back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from moestream.errors import CheckpointError, RequestError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD = 8
"""Tokens that may wait for the rest of a character. UTF-8 needs at most 4 bytes, so more than this is not text."""
MAX_JSON_BYTES = 64 << 20


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        eos_ids: Tokens that end a reply, as any of the configuration files of the folder says.
        config: ``tokenizer_config.json``, or an empty dict.
    """

    def __init__(self, backend: HfTokenizer, eos_ids: Iterable[int], config: dict[str, Any]) -> None:
        self._backend = backend
        self.eos_ids = frozenset(eos_ids)
        self.config = config

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and the special tokens.

        Raises:
            CheckpointError: a file is missing or malformed.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: text needs it (token ids work without). "
                "Download the tokenizer.json that belongs to the model into this folder"
            )
        try:
            backend = HfTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        return cls(backend, _eos_ids(folder, backend, config), config)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: Any text; added tokens in it (``<|im_start|>``) are recognised.
            special: Add what the tokenizer puts around a text (a start token); False for a rendered chat template.

        Raises:
            RequestError: the text is not valid Unicode.
            CheckpointError: the tokenizer cannot take it.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        except (UnicodeEncodeError, TypeError) as error:  # a lone surrogate is a TypeError here
            raise RequestError(f"the text is not valid Unicode: {error}") from error
        except Exception as error:  # tokenizers raises plain Exception, for example where an unk_token is missing
            raise CheckpointError(f"tokenizer.json cannot encode this text: {error}") from error
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; special tokens are left out unless asked for."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def token_id(self, token: str) -> int | None:
        """Id of a token given as text, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    @property
    def longest(self) -> int:
        """Length of the longest token; byte-level tokens count bytes."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def to_json(self) -> str:
        """The tokenizer as ``tokenizer.json`` holds it."""
        return str(self._backend.to_str())

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))


class TextStream:
    """Text of one reply as its tokens arrive: whole characters only, ended by stop strings.

    The text of a token depends on its neighbours, so each step decodes the last emitted piece together with the new
    one and emits the difference. A reply of bytes that are not UTF-8 is shown with replacement characters.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._context: list[int] = []  # tokens already emitted that the next ones are decoded with
        self._fresh: list[int] = []  # tokens not emitted yet
        self._held = ""  # decoded, but may be the start of a stop string
        self.stopped: str | None = None
        """The stop string that ended the reply."""

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain."""
        if self.stopped is not None:
            return ""
        self._fresh.append(token)
        return self._release(self._decode(final=False), final=False)

    def finish(self) -> str:
        """The rest, at the end of the reply."""
        if self.stopped is not None:
            return ""
        return self._release(self._decode(final=True), final=True)

    def _decode(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._fresh)
        if len(text) <= len(before):  # special tokens show nothing; the old context must stay, it may decide on a space
            self._fresh = self._fresh if len(self._fresh) < MAX_HELD else []
            return ""
        if text.endswith(REPLACEMENT) and len(self._fresh) < MAX_HELD and not final:
            return ""
        self._context, self._fresh = self._fresh, []
        return text[len(before) :]

    def _release(self, text: str, *, final: bool) -> str:
        text = self._held + text
        self._held = ""
        # the first to be complete ends the reply, so that the size of the pieces does not matter
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, _, self.stopped = min(found)
            return text[: end - len(self.stopped)]
        if final:
            return text
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder; empty when the file does not exist.

    Raises:
        CheckpointError: the file cannot be read, is not a JSON object or is unreasonably large.
    """
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, more than {MAX_JSON_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _eos_ids(folder: Path, backend: HfTokenizer, tokenizer_config: dict[str, Any]) -> set[int]:
    """Every id that any of the folder's files calls an end token."""
    ids: set[int] = set()
    config = read_json(folder / "config.json")
    text_config = config.get("text_config")
    for source in (read_json(folder / "generation_config.json"), config, text_config):
        if isinstance(source, dict):
            value = source.get("eos_token_id")
            found = value if isinstance(value, list) else [value]
            ids.update(i for i in found if isinstance(i, int) and not isinstance(i, bool) and i >= 0)
    token = special_token(tokenizer_config, "eos_token")
    named = backend.token_to_id(token) if token else None
    if named is not None:
        ids.add(named)
    return ids


def special_token(config: dict[str, Any], name: str) -> str | None:
    """A special token of ``tokenizer_config.json``, stored as text or as an object with ``content``."""
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
