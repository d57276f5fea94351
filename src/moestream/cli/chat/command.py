"""``moestream chat``: flags, then the loop of messages and commands."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestream.cli import options
from moestream.cli.output import INTERRUPTED
from moestream.cli.run import load

if TYPE_CHECKING:
    from moestream.cli.chat.commands import Commands
    from moestream.cli.chat.editor import Editor
    from moestream.cli.chat.session import Session

CHAT = "Chat"
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the last conversation, with its model unless --model names another.",
        rich_help_panel=CHAT,
    ),
]
Tools = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.py",
        help="Functions with type hints and docstrings that the model may call. The file is run; every call is "
        "shown and asked for.",
        rich_help_panel=CHAT,
    ),
]


def chat(
    ctx: typer.Context,
    model: options.Model = "demo",
    ram: options.Ram = None,
    threads: options.Threads = None,
    cache: options.Cache = None,
    stored_plan: options.StoredPlan = True,
    prefetch: options.Prefetch = "auto",
    active_experts: options.ActiveExperts = None,
    exact: options.Exact = False,
    context: options.Context = None,
    prefill_chunk: options.PrefillChunk = None,
    prefix_cache: options.PrefixCache = None,
    prefix_disk: options.PrefixDisk = 0,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="New tokens at most.",
            rich_help_panel=options.SAMPLING,
            show_default="until the context is full",
        ),
    ] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.", rich_help_panel=CHAT)] = None,
    resume: Resume = False,
    tools: Tools = None,
    yes_tools: Annotated[
        bool, typer.Option("--yes-tools", help="Run every call without asking.", rich_help_panel=CHAT)
    ] = False,
    private: Annotated[
        bool,
        typer.Option("--private", help="Write neither the conversation nor what is typed down.", rich_help_panel=CHAT),
    ] = False,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Text as it comes, for screen readers and pipes: no Markdown, no colours, no live line.",
            rich_help_panel=CHAT,
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="The whole receipt after each reply.", rich_help_panel=CHAT)
    ] = False,
) -> None:
    """Talk to a model. /? lists the commands, /bye or Ctrl-D ends the chat, Ctrl-C ends only the reply."""
    from moestream.cli.chat.conversation import Chats, Conversation  # noqa: PLC0415
    from moestream.cli.chat.screen import Screen, no_echo  # noqa: PLC0415
    from moestream.cli.chat.session import Session  # noqa: PLC0415
    from moestream.cli.chat.tools import load_tools  # noqa: PLC0415

    known = load_tools(tools) if tools else {}
    chats = Chats(private=private)
    conversation = chats.resume() if resume else Conversation(model=model)
    source = ctx.get_parameter_source("model")
    if resume and source is not None and source.name == "DEFAULT":
        model = conversation.model or model
    conversation.parameters |= options.given(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    conversation.system = conversation.system if system is None else system or None
    states = (context, prefill_chunk, stored_plan, prefetch, prefix_cache, prefix_disk)
    with load(model, ram, threads, cache, active_experts, exact, *states) as llm:
        screen = Screen(plain or not _rich_terminal())
        session = Session(llm, model, conversation, chats, screen, known, told="verbose" if verbose else "normal")
        session.params()  # a resumed one may hold what cannot be used
        with contextlib.nullcontext() if screen.plain else no_echo():  # an editor shows keys by itself
            _talk(session, yes_tools)


def _talk(session: Session, yes_tools: bool) -> None:
    """The loop."""
    from moestream.cli.chat.commands import Bye, Commands  # noqa: PLC0415
    from moestream.cli.chat.editor import Asked  # noqa: PLC0415

    commands = Commands(session, lambda: editor)
    editor = _editor(session, commands)
    session.consent = Asked(editor, session.screen, yes_tools)
    if session.conversation.messages:
        session.adopt(session.conversation, "going on")
    if sys.stdin.isatty():
        session.screen.say("/? lists the commands, /bye ends, Ctrl-C stops a reply.")
    while True:
        draft, session.draft = session.draft, ""
        try:
            text = editor.message(draft)
            if text.startswith("/"):
                session.edited = None
                commands.run(text)
            elif text.strip():
                session.ask(text.strip())
        except (EOFError, Bye):
            return
        except KeyboardInterrupt:
            session.edited = None
            if not sys.stdin.isatty():
                raise typer.Exit(INTERRUPTED) from None
            session.screen.say("(/bye or Ctrl-D ends the chat)")


def _editor(session: Session, commands: Commands) -> Editor:
    from moestream.cli.chat.editor import PlainEditor, RichEditor  # noqa: PLC0415

    def toolbar() -> str:
        last = session.receipt if session.conversation.messages else None
        used = last.prompt_tokens + last.new_tokens if last else 0
        context = session.llm.runtime.engine.context
        return f"{Path(session.model).name} · {used} of {context} tokens · /? for help"

    if session.screen.plain:
        return PlainEditor()
    history = None if session.chats.private else session.chats.root / "typed"
    return RichEditor(history, commands.words, toolbar)


def _rich_terminal() -> bool:
    """Whether both ends are a terminal that can move its cursor and show every character."""
    dumb = os.environ.get("TERM", "dumb") in ("", "dumb", "unknown")
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    if not utf8:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    return sys.stdin.isatty() and sys.stdout.isatty() and utf8 and not dumb
