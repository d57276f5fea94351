"""Sessions with real models: what is asked, said, called and kept."""

from __future__ import annotations

import itertools
import json
import signal

import pytest
from golden_models import FOLDER
from text_models import BACKEND, NAME, load, tokenizer_of

from moestream import LLM
from moestream.cli.chat.commands import Bye, Commands
from moestream.cli.chat.conversation import Chats, Conversation
from moestream.cli.chat.screen import Screen
from moestream.cli.chat.session import MAX_ROUNDS, Consent, Session
from moestream.cli.chat.tools import load_tools
from moestream.engine.engine import Engine
from moestream.errors import TemplateError
from moestream.text.chat_template import ChatTemplate

pytestmark = pytest.mark.filterwarnings("ignore:slow fallback")
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is undefined or enable_thinking %}<think>{% endif %}"
)
TOOLS = '''
def get_weather(city: str) -> dict[str, object]:
    """Get the current weather of a city."""
    return {"city": city, "temperature": 21}
'''
WEATHER = "What is the weather in Paris?"


class Yes(Consent):
    def __call__(self, call):
        return True


@pytest.fixture(scope="module")
def demo():
    with LLM.load("demo", ram="2GB", prefix_cache="100MB", backend=BACKEND) as llm:
        yield llm


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A random model whose template makes it think."""
    path = tmp_path_factory.mktemp("thinker")
    for file in (FOLDER / NAME).iterdir():
        (path / file.name).symlink_to(file)
    tokenizer_of(160).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": THINKING}))
    with load(path, context=700) as llm:
        yield llm


@pytest.fixture
def open_session(tmp_path):
    def make(llm, **settings):
        conversation = Conversation(model="demo", parameters={"temperature": 0})
        return Session(llm, "demo", conversation, Chats(tmp_path), Screen(plain=True), **settings)

    return make


def interrupt_after(monkeypatch, steps):
    """Press Ctrl-C before one of the next steps."""
    step, count = Engine.step, itertools.count(1)

    def method(self):
        if next(count) == steps:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", method)


def roles(session):
    return [message.role for message in session.conversation.messages]


def test_follow_up_turns_read_only_what_is_new(demo, open_session, capsys):
    session = open_session(demo)
    session.ask("Tell me a story about a fox and the seven animals it met on its way to the old mill by the river")
    first = session.receipt
    session.ask("And then?")
    assert first.prompt_tokens + first.new_tokens > 64  # shorter ones are not worth a snapshot
    assert session.receipt.prompt_tokens > first.prompt_tokens + first.new_tokens
    assert session.receipt.prompt_tokens - session.receipt.cached_tokens < 20
    out, err = capsys.readouterr()
    assert out == "".join(m.content + "\n" for m in session.conversation.messages if m.role == "assistant")
    assert err.count("tok/s") == 2


def test_interrupted_reply_is_kept_and_marked(demo, open_session, monkeypatch, capsys):
    session = open_session(demo)
    interrupt_after(monkeypatch, 12)
    session.ask("Tell me a story about a fox")
    said = session.conversation.messages[1]
    assert said.cut == "cancelled"
    assert said.content.startswith("Once upon")
    assert session.receipt.new_tokens <= 12
    assert "[stopped; what was said stays" in capsys.readouterr().err
    session.ask("And then?")
    assert session.receipt.finish_reason == "stop"
    assert Chats(session.chats.root).resume() == session.conversation
    assert "cut" not in session.conversation.for_template()[1]


def test_interrupt_before_the_first_word_gives_the_message_back(demo, open_session, monkeypatch):
    session = open_session(demo)
    render = ChatTemplate.render

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return render(*args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", interrupted)
    session.ask("Tell me a story about a fox")
    assert not roles(session)
    assert session.draft == "Tell me a story about a fox"


def test_thoughts_are_folded_and_can_be_read(thinker, open_session, capsys):
    session = open_session(thinker)
    run = Commands(session, None).run
    run("/set parameter temperature 1")
    for seed in range(20):  # random weights end a thought by chance
        run(f"/set parameter seed {seed}")
        session.conversation.messages.clear()
        session.ask("hello")
        said = session.conversation.messages[-1:]
        if said and said[0].reasoning_content and said[0].content:
            break
    out, err = capsys.readouterr()
    assert said[0].reasoning_content == session.thought
    assert said[0].content.strip() in out
    assert session.thought not in out
    assert "[thought for " in err
    run("/show thinking")
    assert capsys.readouterr().out.strip() == session.thought
    run("/set nothink")
    assert thinker.render(session.conversation.for_template(), enable_thinking=False).endswith("assistant\n")
    session.ask("hello")
    assert session.thought == ""


def test_calls_run_with_consent_only(demo, open_session, tmp_path, capsys):
    (tmp_path / "tools.py").write_text(TOOLS)
    tools = load_tools(tmp_path / "tools.py")
    refused = open_session(demo, tools=tools)
    refused.ask(WEATHER)
    assert "[get_weather was not run]" in capsys.readouterr().err
    assert refused.conversation.messages[2].content == "error: the user did not allow this call"
    session = open_session(demo, tools=tools, consent=Yes())
    session.ask(WEATHER)
    assert roles(session)[:4] == ["user", "assistant", "tool", "assistant"]
    call, result = session.conversation.messages[1:3]
    assert call.tool_calls[0]["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert json.loads(result.content) == {"city": "Paris", "temperature": 21}
    assert Chats(session.chats.root).resume() == session.conversation


def test_rounds_of_calls_are_bounded(demo, open_session, tmp_path, capsys, monkeypatch):
    (tmp_path / "tools.py").write_text(TOOLS.replace('return {"city": city, "temperature": 21}', f"return {WEATHER!r}"))
    session = open_session(demo, tools=load_tools(tmp_path / "tools.py"), consent=Yes())
    monkeypatch.setattr("moestream.cli.chat.session.MAX_ROUNDS", 1)
    session.ask(WEATHER)
    assert roles(session) == ["user", "assistant", "tool"]
    assert "stopped after 1 rounds" in capsys.readouterr().err
    assert MAX_ROUNDS > 1


def test_regenerate_and_edit(demo, open_session):
    session = open_session(demo)
    commands = Commands(session, None)
    session.conversation.parameters = {"temperature": 1, "seed": 1, "max_tokens": 30}
    session.ask("Tell me a story about a fox")
    first = session.conversation.messages[1].content
    commands.run("/regenerate")
    assert roles(session) == ["user", "assistant"]
    assert session.conversation.messages[1].content != first
    commands.run("/edit")
    assert session.draft == "Tell me a story about a fox"
    assert roles(session) == ["user", "assistant"]  # nothing is lost before it is sent
    session.ask("Tell me a story about a cat")
    assert [m.content for m in session.conversation.messages if m.role == "user"] == ["Tell me a story about a cat"]


def test_settings(demo, open_session, capsys):
    session = open_session(demo)
    run = Commands(session, None).run
    for line in ("/set parameter temperature 0.5", "/set parameter repeat_penalty 1.2", '/set parameter stop "\\n"'):
        run(line)
    assert session.params().temperature == 0.5
    assert session.params().repetition_penalty == 1.2
    assert session.params().stop == ("\n",)
    assert session.params().max_tokens is None
    capsys.readouterr()
    for line, says in (
        ("/set parameter temperature 900", "temperature must be at least 0"),
        ("/set parameter temperature warm", "temperature must be a number"),
        ("/set parameter top_k 1.5", "top_k must be a whole number"),
        ("/set parameter warmth 1", "temperature, top_k"),
        ("/set parameter num_ctx 1", "--context"),
        ("/set think", "no switch for thinking"),
        ("/set", "parameter, think"),
        ("/sat", "unknown command /sat"),
        ("/show all", "model, settings"),
        ("/load ../x", "no name"),
        ("/load nothing", "no conversation 'nothing'"),
        ("/regenerate", "no message"),
    ):
        run(line)
        assert says in capsys.readouterr().err, line
    assert session.params().temperature == 0.5
    run("/set parameter temperature default")
    assert "temperature" not in session.conversation.parameters
    run('/set system """Be\nbrief."""')
    assert session.conversation.for_template() == [{"role": "system", "content": "Be\nbrief."}]
    run("/show")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("demo", "40 a layer", "1.2 (set)", "brief."))
    run('/set system ""')
    assert not session.conversation.for_template()
    run("/help")
    assert "/regenerate" in capsys.readouterr().out
    with pytest.raises(Bye):
        run("/bye")


def test_save_load_clear(demo, open_session, capsys):
    session = open_session(demo)
    commands = Commands(session, None)
    session.conversation.parameters |= {"max_tokens": 5}
    session.ask("hello")
    for line in ("/save fox", "/clear"):
        commands.run(line)
    assert not session.conversation.messages
    assert session.conversation.parameters["max_tokens"] == 5
    commands.run("/load fox")
    assert roles(session) == ["user", "assistant"]
    commands.run("/load")
    assert "hello" in capsys.readouterr().out
    assert "fox" in commands.words("/load")
    bad = session.chats.root / "bad.json"
    bad.write_text('{"parameters": {"warmth": 1}}')
    commands.run("/load bad")
    assert "unknown sampling parameter warmth" in capsys.readouterr().err
    assert roles(session) == ["user", "assistant"]


def test_models_that_cannot_chat_are_refused(thinker, open_session, tmp_path):
    (tmp_path / "tools.py").write_text(TOOLS)
    with pytest.raises(TemplateError, match="how this model writes calls"):
        open_session(thinker, tools=load_tools(tmp_path / "tools.py"))
