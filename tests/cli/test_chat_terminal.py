"""The chat as a person at a terminal sees it, with the model in the package."""

from __future__ import annotations

import json

import pytest
from chat_terminal import ChatTerminal

GREEDY = ("--temperature", 0, "--ram", "2GB")
TOOLS = '''
from pathlib import Path


def get_weather(city: str) -> dict[str, object]:
    """Get the current weather of a city."""
    Path(__file__).with_name("ran").open("a").write(city)
    return {"city": city, "temperature": 21}
'''
LIVE = "tokens · Ctrl-C stops"
"""At the end of the line about the machine, as long as a reply is written."""


@pytest.fixture
def tools(tmp_path):
    (tmp_path / "tools.py").write_text(TOOLS)
    return tmp_path / "tools.py"


def test_interrupt_ends_only_the_reply_and_resume_goes_on(tmp_path):
    endless = ("--temperature", 1, "--seed", 5, "--ram", "2GB", "--context", 2048)
    with ChatTerminal(*endless, chats=tmp_path) as terminal:
        terminal.wait("/? lists the commands", "tokens · /? for help")
        terminal.type("Tell me a story about a fox\r")
        terminal.wait("hits", LIVE)
        terminal.type("\x03")
        terminal.wait("[stopped; what was said stays", "tokens · /? for help")
        terminal.type("\x03")
        terminal.wait("(/bye or Ctrl-D ends the chat)")
        terminal.type('"""Say it\ragain"""')
        terminal.wait('again"""', after="Say it")
        terminal.type("\r")
        shown = terminal.wait("tok/s", "prompt", after="again")
        assert LIVE not in shown
        terminal.type("/by")
        terminal.wait("/bye", after="> /by")  # the menu
        terminal.type("e\r")
        assert terminal.end() == 0
    kept = json.loads(next((tmp_path / "recent").iterdir()).read_text())["messages"]
    assert [m["role"] for m in kept] == ["user", "assistant", "user", "assistant"]
    assert kept[1]["cut"] == "cancelled"
    assert kept[1]["content"]
    assert kept[2]["content"] == "Say it\nagain"
    with ChatTerminal(*GREEDY, "--resume", chats=tmp_path) as terminal:
        terminal.wait("going on: 4 messages", "Tell me a story", "tokens · /? for help")
        terminal.type("/show conversation\r")
        said = "assistant (cancelled): " + kept[1]["content"][:20]
        terminal.wait(
            said, "tokens · /? for help", after="/show conversation"
        )  # Ctrl-D is lost before the prompt is back
        terminal.type("\x04")
        assert terminal.end() == 0


def test_call_runs_only_after_a_yes_to_its_question(tmp_path, tools):
    with ChatTerminal(*GREEDY, "--tools", tools, chats=tmp_path) as terminal:
        terminal.wait("tokens · /? for help")
        terminal.type("What is the weather in Paris?\ry\r")  # the y was typed before there was a question
        terminal.wait("call get_weather(", 'city = "Paris"', "run it? [y]es / [N]o")
        assert not tools.with_name("ran").exists()
        terminal.type("\x03")
        terminal.wait("[stopped]", "tokens · /? for help", after="run it?")
        assert not tools.with_name("ran").exists()
        terminal.type("/regenerate\r")
        terminal.wait("run it?", count=2)
        terminal.type("y\r")
        terminal.wait("[get_weather took", "prompt", after="/regenerate")
        assert tools.with_name("ran").read_text() == "Paris"
        terminal.type("/bye\r")
        assert terminal.end() == 0


def test_dumb_terminal_gets_plain_text(tmp_path, tools):
    with ChatTerminal(*GREEDY, "--tools", tools, "--max-tokens", 40, term="dumb", chats=tmp_path) as terminal:
        terminal.wait("\n>")
        terminal.type("What is the weather in Paris?\r")
        terminal.wait("run it?")
        terminal.type("\x03")
        terminal.wait("[stopped]", "\n>", after="run it?")
        terminal.type("\x04")
        assert terminal.end() == 0
        assert LIVE not in terminal.text()
    assert not tools.with_name("ran").exists()
