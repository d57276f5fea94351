"""Parts of the chat that need no model: files, tools, Markdown while it grows, what is typed."""

from __future__ import annotations

import io
import os
import random
import re
import stat
import time

import pytest
import typer.testing
from rich.console import Console

from moestream.cli.chat.conversation import Chats, Conversation, Message
from moestream.cli.chat.editor import joined, unfinished
from moestream.cli.chat.markdown import MarkdownStream
from moestream.cli.chat.screen import visible
from moestream.cli.chat.tools import MAX_RESULT, load_tools
from moestream.cli.main import app
from moestream.errors import ConfigError


def talk(*texts):
    roles = ("user", "assistant")
    return Conversation(model="m", messages=[Message(role=roles[i % 2], content=t) for i, t in enumerate(texts)])


def test_conversations_come_back_as_they_were(tmp_path):
    said = talk("hello\n“you” 🦊", "hi")
    said.system, said.think, said.parameters = "Be brief.", False, {"temperature": 0.5, "stop": ["x"]}
    said.messages[1].cut = "cancelled"
    chats = Chats(tmp_path)
    path = chats.save("fox", said)
    assert Chats(tmp_path).load("fox") == said
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == stat.S_IMODE(tmp_path.stat().st_mode) & 0o077
    assert [file.name for file in tmp_path.iterdir()] == ["fox.json"]


def test_saving_replaces_only_what_it_goes_on_with(tmp_path):
    chats = Chats(tmp_path)
    chats.save("fox", talk("a", "b"))
    chats.save("fox", talk("a", "b", "c", "d"))
    for other in (talk("a", "b"), talk("x", "b", "c", "d", "e")):
        with pytest.raises(FileExistsError):
            chats.save("fox", other)
    assert len(chats.load("fox").messages) == 4
    chats.save("fox", talk("x"), replace=True)
    (tmp_path / "fox.json").write_text("not ours")
    with pytest.raises(FileExistsError):
        chats.save("fox", talk("x"))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    chats = Chats(tmp_path)
    chats.save("fox", talk("a"))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        chats.save("fox", talk("a", "b"))
    assert chats.load("fox") == talk("a")
    assert [file.name for file in tmp_path.iterdir()] == ["fox.json"]


def test_two_chats_never_write_into_one_file(tmp_path):
    one, other = Chats(tmp_path), Chats(tmp_path)
    one.keep(talk("a"))
    assert other.resume() == talk("a")
    other.keep(talk("a", "b", "c"))
    one.keep(talk("a", "x"))
    kept = [Conversation.model_validate_json(file.read_bytes()) for file in (tmp_path / "recent").iterdir()]
    assert sorted(len(c.messages) for c in kept) == [2, 3]
    one.begin()
    one.keep(talk("new"))
    assert len(list((tmp_path / "recent").iterdir())) == 3
    assert set(one.names()) == {file.stem for file in (tmp_path / "recent").iterdir()}


def test_resume_takes_the_latest_and_private_writes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no conversation to resume"):
        Chats(tmp_path).resume()
    Chats(tmp_path, private=True).keep(talk("secret"))
    assert not list(tmp_path.iterdir())
    for text in ("a", "b"):
        Chats(tmp_path).keep(talk(text))
    newest = time.time_ns() + 10**9
    os.utime(next(f for f in (tmp_path / "recent").iterdir() if '"a"' in f.read_text()), ns=(newest, newest))
    assert Chats(tmp_path).resume() == talk("a")


def test_resume_goes_on_with_the_model_of_the_conversation(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESTREAM_CHATS", str(tmp_path))
    said = talk("a").model_copy(update={"model": str(tmp_path / "gone")})
    Chats(tmp_path).keep(said)
    for flags, wanted in (([], "gone"), (["--model", str(tmp_path / "other")], "other")):
        result = typer.testing.CliRunner().invoke(app, ["chat", "--resume", *flags])
        assert result.exit_code
        assert wanted in str(result.exception)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Invalid JSON"),
        (b"\xff\xfe", "fox.json"),
        (b"[]", "the file"),
        (b'{"messages": [{"role": "user"}]}', "messages.0.content"),
        (b'{"messages": [{"role": "admin", "content": ""}]}', "messages.0.role"),
        (b'{"format": "other"}', "format"),
        (b'{"nonsense": 1}', "nonsense"),
    ],
)
def test_damaged_files_are_named_with_their_field(tmp_path, content, says):
    (tmp_path / "fox.json").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        Chats(tmp_path).load("fox")
    assert "fox.json" in str(error.value)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 81, "a\nb"])
def test_names_stay_in_their_folder(tmp_path, name):
    for use in (Chats(tmp_path).load, lambda n: Chats(tmp_path).save(n, talk("a"))):
        with pytest.raises(ConfigError, match="no name for a conversation"):
            use(name)


def write(tmp_path, code):
    (tmp_path / "tools.py").write_text(code)
    return tmp_path / "tools.py"


GOOD = '''
from __future__ import annotations
from os.path import join  # not ours
from typing import Literal

def _helper(): ...

def find(word: str, limit: int = 3, at: Literal["title", "text"] = "text", *, exact: bool | None = None) -> list[str]:
    """Find a word.

    It may be anywhere.
    """
    return [word] * limit

def fail() -> None:
    """Always fails."""
    raise SystemExit("stop")

def long() -> str:
    """Says much."""
    return "é" * 50_000
'''


def test_functions_become_tools(tmp_path):
    tools = load_tools(write(tmp_path, GOOD))
    assert set(tools) == {"find", "fail", "long"}
    function = tools["find"].schema["function"]
    assert function["description"] == "Find a word.\n\nIt may be anywhere."
    assert function["parameters"]["required"] == ["word"]
    properties = function["parameters"]["properties"]
    assert properties["word"] == {"type": "string"}
    assert properties["at"]["enum"] == ["title", "text"]
    assert tools["find"]({"word": "é", "limit": "2"}) == '["é", "é"]'
    for wrong, says in (({"limit": 1}, "word"), ({"word": "a", "limit": "x"}, "limit"), ({"word": "", "z": 1}, "z")):
        assert tools["find"](wrong).startswith("error: the arguments are wrong: ")
        assert says in tools["find"](wrong)
    assert tools["fail"]({}) == "error: SystemExit: stop"
    assert tools["long"]({}).endswith("50000 characters in all]")
    assert len(tools["long"]({})) < MAX_RESULT + 100


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = (", "SyntaxError"),
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("x = 1", "defines no function"),
        ("def f(): ...", "f needs a docstring"),
        ("def f(a):\n 'Doc.'", "a needs a type hint"),
        ("def f(*a: int):\n 'Doc.'", "cannot be filled"),
        ("async def f():\n 'Doc.'", "async"),
        ("class A: ...\ndef f(a: A):\n 'Doc.'", "f: "),
        ("def f(a: 'B'):\n 'Doc.'", "f: "),
    ],
)
def test_unusable_tools_are_named(tmp_path, code, says):
    with pytest.raises(ConfigError, match=r"tools\.py") as error:
        load_tools(write(tmp_path, code))
    assert says in str(error.value)


def test_tools_must_be_a_python_file(tmp_path):
    with pytest.raises(ConfigError, match="no Python file"):
        load_tools(tmp_path / "tools.json")


def test_what_is_typed():
    for text in ('"""a', '"""', "a\\", '/set system """a\nb'):
        assert unfinished(text), text
    for text in ("a", '"""a"""', '""""""', 'it """ is', "a\\\\", '/set system """a"""', "/set system a"):
        assert not unfinished(text), text
    assert joined('"""\na\nb\n"""') == "a\nb"
    assert joined("a\\\nb") == "a\nb"
    assert joined(' "a" ') == ' "a" '


def test_replies_cannot_steer_the_terminal():
    assert visible("a\x1b[2Jb\rc\x07\x9b\u202e") == "a<U+001B>[2Jbc<U+0007><U+009B><U+202E>"
    assert visible("é\n\t日本 👩\u200d🚀 עברית") == "é\n\t日本 👩\u200d🚀 עברית"


DOCUMENT = (
    """# Title

A paragraph with **bold** and `code` that is long enough to be wrapped in a narrow terminal.

1. one
1. two
   - inner
   - other
1. three

| a | b |
|---|--:|
| first | 1 |
| second | 22 |

```python
"""
    + "\n".join(f"line_{i} = {i}" for i in range(30))
    + """
```

> quoted
goes on

---
The end."""
)


def stream(text, pieces, room=6):
    console = Console(file=io.StringIO(), width=40, height=12, color_system=None)
    markdown = MarkdownStream(console)
    lines = []
    for piece in pieces:
        markdown.push(piece)
        done, rest = markdown.take(room)
        lines += done
        assert len(rest) <= room
    done, rest = markdown.take(room, final=True)
    assert not rest
    return ["".join(segment.text for segment in line).rstrip() for line in lines + done]


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_markdown_in_pieces_is_the_markdown_of_the_whole(size):
    whole = stream(DOCUMENT, [DOCUMENT])
    assert stream(DOCUMENT, [DOCUMENT[i : i + size] for i in range(0, len(DOCUMENT), size)]) == whole
    text = "\n".join(whole)
    assert [n for n in re.findall(r"^ (\d) \w", text, re.M)] == ["1", "2", "3"]
    assert re.findall(r"line_(\d+)", text) == [str(i) for i in range(30)]  # more than the screen holds, none lost
    assert "**" not in text
    assert text.endswith("The end.")


def test_any_markdown_loses_nothing():
    parts = (
        "# |- |* |1. |    |\n|\n\n|```\n|~~~|> |word |goes on and on until it has to be wrapped |**|`|<b>|---\n|🦊|[["
    )
    random_ = random.Random(1)
    for _ in range(60):
        text = "".join(random_.choice([*parts.split("|"), "|", "|---|---|\n"]) for _ in range(25))
        whole = stream(text, [text])
        pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        assert [line for line in stream(text, pieces) if line] == [line for line in whole if line], text
