"""What only a person at a terminal sees: Ctrl-C before the reply, and the bar while waiting."""

from __future__ import annotations

import io
import signal
import sys
import time

import pytest
import typer.testing

from moestream.cli.main import app
from moestream.cli.output import Bar, percent
from moestream.engine.engine import Engine
from moestream.text.chat_template import ChatTemplate

COMMAND = ("--context", "400", "--max-tokens", "50", "--prefill-chunk", "4", "--temperature", "0")


def interrupt_in(monkeypatch, owner, name):
    """Press Ctrl-C once, while a method runs."""
    original, pressed = getattr(owner, name), []

    def method(*args, **kwargs):
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.filterwarnings("ignore:slow fallback")  # of an install without a compiler
@pytest.mark.parametrize(("owner", "name"), [(ChatTemplate, "render"), (Engine, "check"), (Engine, "step")])
def test_interrupt_before_the_first_token_ends_the_run_without_one(model, monkeypatch, owner, name):
    interrupt_in(monkeypatch, owner, name)
    result = typer.testing.CliRunner().invoke(app, ["run", "--model", str(model), "hello there", *COMMAND])
    assert result.exit_code == 130, result.output
    assert result.stdout.strip() == ""
    assert " 50 tokens" not in result.stderr


@pytest.mark.filterwarnings("ignore:slow fallback")
@pytest.mark.parametrize(("owner", "name"), [(ChatTemplate, "render"), (Engine, "step")])
def test_interrupt_before_the_first_token_ends_only_that_reply(model, monkeypatch, owner, name):
    interrupt_in(monkeypatch, owner, name)
    command = ["chat", "--private", "--model", str(model), *COMMAND]
    result = typer.testing.CliRunner().invoke(app, command, input="hello\nhello\n/bye\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("[50 tokens") == 1  # of the second


class Terminal(io.StringIO):
    """A stderr that says it is one."""

    def isatty(self):
        return True


def test_bar_shows_after_a_second_and_is_gone_afterwards(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Bar(percent) as bar:
        bar.update("Reading the prompt", 30, 120)
        assert sys.stderr.getvalue() == ""
        deadline = time.monotonic() + 30
        while "25 %" not in sys.stderr.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "Reading the prompt" in sys.stderr.getvalue()
        bar.hide()
        assert sys.stderr.getvalue().endswith(("\x1b[2K", "\x1b[?25h"))  # the line erased, the cursor back
        assert sys.stdout is not sys.stderr


def test_bar_of_a_short_wait_or_without_a_terminal_shows_nothing(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with Bar() as bar:
            bar.update("Loading")
        assert stream.getvalue() == ""
