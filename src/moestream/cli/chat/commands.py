"""What begins with a slash: settings, conversations, and a look at how things stand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from moestream.cli.chat.editor import Editor, unquoted
from moestream.cli.chat.session import PARAMETERS, Session
from moestream.errors import ConfigError, RequestError

ALIASES = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
"""As other programs call them."""
SHOWS = ("model", "settings", "system", "receipt", "thinking", "reply", "conversation", "tools")
SETS = ("system", "parameter", "think", "nothink", "verbose", "normal", "quiet")
HELP = '''\
/set system TEXT          what the model is told first; /set system "" removes it
/set parameter NAME VALUE sampling: {parameters}; VALUE default resets one
/set think, nothink       where the model's chat template has that switch
/set verbose, normal, quiet   the whole receipt after each reply, a line, or nothing
/show                     how things stand; /show {shows}
/regenerate               another answer to the last message
/edit                     change the last message and send it again
/save NAME, /load NAME    keep a conversation under a name; /load alone lists them
/clear                    begin a new conversation (also /new)
/bye                      end (also Ctrl-D)
Ctrl-C stops a reply. Alt-Enter or a backslash at the end goes on in a new line, and so does text between """ and """.
A message that begins with a slash: put a space before it.'''


class Bye(Exception):
    """The person ends the chat."""


class Commands:
    """Runs commands on a session."""

    def __init__(self, session: Session, editor: Callable[[], Editor]) -> None:
        """Make the table.

        Args:
            session: What they work on.
            editor: Asks before something is overwritten.
        """
        self._session = session
        self._editor = editor
        self._known: dict[str, Callable[[str], None]] = {
            "/set": self._set,
            "/show": self._show,
            "/regenerate": self._regenerate,
            "/edit": self._edit,
            "/save": self._save,
            "/load": self._load,
            "/clear": self._clear,
            "/help": self._help,
            "/bye": self._bye,
        }
        self._other = {"/?": "/help", "/new": "/clear", "/exit": "/bye", "/quit": "/bye", "/retry": "/regenerate"}

    def run(self, line: str) -> None:
        """Run a line that begins with a slash; what is wrong with it is said on the screen.

        Raises:
            Bye: it ends the chat.
        """
        name, _, rest = line.partition(" ")
        name = self._other.get(name.strip(), name.strip())
        command = self._known.get(name)
        try:
            if command is None:
                raise ConfigError(f"unknown command {name}; /? lists them. For a message, put a space before the slash")
            command(rest.strip())
        except (ConfigError, RequestError, OSError) as error:
            self._session.screen.warn(str(error))

    def words(self, head: str) -> Iterable[str]:
        """What may come after the beginning of a command, for completion."""
        match head.split():
            case []:
                return [*self._known, "/?"]
            case ["/set"]:
                return SETS
            case ["/set", "parameter"]:
                return PARAMETERS
            case ["/show"]:
                return SHOWS
            case ["/load" | "/save"]:
                return self._session.chats.names()
            case _:
                return ()

    def _help(self, _: str) -> None:
        self._session.screen.text(HELP.format(parameters=", ".join(PARAMETERS), shows=", ".join(SHOWS)))

    def _bye(self, _: str) -> None:
        raise Bye

    def _set(self, rest: str) -> None:
        what, _, value = rest.partition(" ")
        session = self._session
        match what:
            case "system":
                self._set_system(value.strip())
            case "parameter":
                self._set_parameter(value.strip())
            case "think" | "nothink":
                if not session.can_switch_thinking:
                    raise ConfigError("the chat template of this model has no switch for thinking")
                session.conversation.think = what == "think"
                session.screen.say(f"[the model is told {'' if what == 'think' else 'not '}to think]")
            case "verbose" | "normal" | "quiet":
                session.told = what
                session.screen.say(f"[{what}]")
            case _:
                raise ConfigError(f"/set takes {', '.join(SETS)}")

    def _set_system(self, value: str) -> None:
        if not value:
            raise ConfigError('/set system TEXT; /set system "" removes it')
        text = unquoted(value)
        if text is None and len(value) > 1 and value[0] == value[-1] == '"':
            text = value[1:-1]
        text = value if text is None else text
        self._session.conversation.system = text or None
        said = "the conversation is read anew with it" if self._session.conversation.messages else "set"
        self._session.screen.say(f"[system message {said if text else 'removed'}]")

    def _set_parameter(self, value: str) -> None:
        name, _, text = value.partition(" ")
        name = ALIASES.get(name, name)
        if name == "num_ctx":
            raise ConfigError("the context is set at the start: moestream chat --context N")
        if name not in PARAMETERS or not text.strip():
            raise ConfigError(f"/set parameter NAME VALUE, where NAME is one of {', '.join(PARAMETERS)}")
        session = self._session
        changed = dict(session.conversation.parameters)
        if text.strip() == "default":
            changed.pop(name, None)
        else:
            changed[name] = _value(name, text.strip())
        params = session.params(changed)
        session.conversation.parameters = changed
        session.screen.say(f"[{name} is {_words(getattr(params, name))}]")

    def _show(self, rest: str) -> None:
        session = self._session
        conversation = session.conversation
        views: dict[str, Callable[[], str]] = {
            "model": self._model,
            "settings": self._settings,
            "system": lambda: conversation.system or "(no system message)",
            "receipt": lambda: "\n".join(session.receipt.lines()) if session.receipt else "(no reply yet)",
            "thinking": lambda: session.thought or "(the last reply had no thoughts)",
            "reply": lambda: next(
                (m.content for m in reversed(conversation.messages) if m.role == "assistant"), "(no reply yet)"
            ),
            "conversation": self._conversation,
            "tools": lambda: (
                "\n".join(json.dumps(t.schema["function"], ensure_ascii=False) for t in session.tools.values())
                or "(none; start with --tools FILE.py)"
            ),
        }
        if not rest:
            session.screen.text("\n".join([self._model(), self._settings(), f"more: /show {'|'.join(SHOWS[3:])}"]))
        elif rest in views:
            session.screen.text(views[rest]())
        else:
            raise ConfigError(f"/show takes {', '.join(SHOWS)}")

    def _model(self) -> str:
        runtime = self._session.llm.runtime
        config, setup = runtime.config, runtime.setup
        used = f"{setup.experts_used} of {setup.experts_native} native per token"
        return "\n".join(
            [
                f"model     {self._session.model} ({runtime.folder})",
                f"experts   {config.moe.experts} a layer; {used}",
                f"context   {runtime.engine.context} tokens; {setup.backend}",
                f"cache     {setup.cache}, {runtime.slots} slots",
            ]
        )

    def _settings(self) -> str:
        session = self._session
        params, changed = session.params(), session.conversation.parameters
        rows = [
            f"{name:20s}{_words(getattr(params, name))}{' (set)' if name in changed else ''}" for name in PARAMETERS
        ]
        think = {None: "as the template does", True: "yes", False: "no"}[session.conversation.think]
        rows.append(f"{'think':20s}{think if session.can_switch_thinking else 'no switch in the template'}")
        rows.append(f"{'system':20s}{session.conversation.system or '(none)'}")
        return "\n".join(rows)

    def _conversation(self) -> str:
        rows = []
        for message in self._session.conversation.messages:
            calls = [call["function"] for call in message.tool_calls or []]
            said = [message.content] if message.content or not calls else []
            said += [f"calls {call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
            cut = f" ({message.cut})" if message.cut else ""
            rows.append(f"{message.role}{cut}: " + "\n".join(said))
        return "\n\n".join(rows) or "(nothing was said yet)"

    def _regenerate(self, _: str) -> None:
        if not self._session.again():
            raise ConfigError("there is no message to answer again")

    def _edit(self, _: str) -> None:
        session = self._session
        last = session.conversation.last_question()
        if last is None:
            raise ConfigError("there is no message to change")
        session.edited, session.draft = last, session.conversation.messages[last].content
        session.screen.say("[the next message replaces this one and its answer; Ctrl-C leaves all as it was]")
        if session.screen.plain:
            session.screen.say(session.draft)

    def _save(self, name: str) -> None:
        session = self._session
        if not name:
            raise ConfigError("/save NAME")
        try:
            path = session.chats.save(name, session.conversation)
        except FileExistsError:
            answer = self._editor().answer(f"another conversation is called {name}. Replace it? [y/N] ")
            if answer.strip().lower() not in ("y", "yes"):
                raise ConfigError(f"not saved: {name} exists; choose another name") from None
            path = session.chats.save(name, session.conversation, replace=True)
        session.screen.say(f"[saved: {path}]")

    def _load(self, name: str) -> None:
        session = self._session
        if not name:
            names = list(session.chats.names())
            rows = [f"{known:24s}{_title(session, known)}" for known in names]
            session.screen.text("\n".join(rows) or f"(nothing is saved in {session.chats.root})")
            return
        loaded = session.chats.load(name)
        session.params(loaded.parameters)
        session.chats.begin()
        session.adopt(loaded, name)

    def _clear(self, _: str) -> None:
        session = self._session
        session.chats.begin()
        session.conversation = session.conversation.model_copy(update={"messages": []})
        session.screen.say("[a new conversation; the settings stay]")


def _value(name: str, text: str) -> Any:
    """A parameter as it is typed: JSON, or a plain text for ``stop``."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if name == "stop":
        return [value] if isinstance(value, str) else value
    if name == "max_tokens" and value == -1:
        return None
    return value


def _words(value: Any) -> str:
    if value is None:
        return "not set"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, tuple | list) else str(value)


def _title(session: Session, name: str) -> str:
    try:
        return session.chats.load(name).title
    except ConfigError:
        return "(cannot be read)"
