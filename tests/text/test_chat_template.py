"""Templates render as their authors meant, and hostile ones end with an error within their limits."""

import json
import os
import signal

import pytest

from moestream.errors import CheckpointError, RequestError, TemplateError
from moestream.text import chat_template
from moestream.text.chat_template import ChatTemplate, TemplateLimits

CHATML = """{%- if tools %}{{ tools | tojson }}
{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}"""
HELLO = [{"role": "user", "content": "hé <b>'x'</b>"}]
LIMITS = TemplateLimits(seconds=30.0, memory=256 << 20, output=100_000)  # a busy machine is slow


@pytest.fixture
def make():
    made = []

    def build(templates, **kwargs):
        templates = {"default": templates} if isinstance(templates, str) else templates
        made.append(ChatTemplate(templates, **({"limits": LIMITS} | kwargs)))
        return made[-1]

    yield build
    for template in made:
        template.close()


def test_renders_messages_tools_and_variables(make):
    template = make(CHATML)
    assert template.render(HELLO) == "<|im_start|>user\nhé <b>'x'</b><|im_end|>\n<|im_start|>assistant\n"
    assert template.render(HELLO, add_generation_prompt=False).endswith("<|im_end|>\n")
    assert template.render(HELLO, enable_thinking=False).endswith("assistant\n<think></think>")
    tools = [{"type": "function", "function": {"name": "f", "description": "größer < kleiner & 'mehr'"}}]
    assert template.render(HELLO, tools=tools).startswith(json.dumps(tools, ensure_ascii=False))  # nothing escaped


def test_tool_calls_reach_the_template_with_objects(make):
    source = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ (c.function or c).arguments.a }};{% endfor %}{% endfor %}"
    )
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": '{"a": "as text"}'}},
        {"function": {"name": "f", "arguments": {"a": "as object"}}},
        {"name": "f", "arguments": '{"a": "flat"}'},
        {"name": "f", "arguments": "not JSON"},
    ]
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert make(source).render(messages) == "as text;as object;flat;;"


def test_what_transformers_offers_to_templates(make):
    source = """
{%- for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}
{{- bos_token }}{{ {'b': 1, 'a': [1.5, none]} | tojson(indent=1) }}
{%- generation %}kept{% endgeneration %}{{ strftime_now('%Y') | length }}"""
    template = make(source, special_tokens={"bos_token": "<s>"})
    assert template.render(HELLO) == '012<s>{\n "b": 1,\n "a": [\n  1.5,\n  null\n ]\n}kept4'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * 10**9 }}", "bytes of memory"),
        ("{% set n = namespace(v='a') %}{% for i in range(60) %}{% set n.v = n.v ~ n.v %}{% endfor %}", "of memory"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 100000 characters"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{% if messages.append(1) %}{% endif %}", "unsafe"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "nested too deeply|process down"),
        ("{% include '/etc/passwd' %}", "failed"),
        ("{% raw", "not valid, line 1"),
        ("\n{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{{ messages[0].content.nothing.more }}", "failed: .*no attribute 'nothing'"),
    ],
)
def test_hostile_or_broken_template_is_an_error(make, source, message):
    with pytest.raises(TemplateError, match=message):
        make(source).render(HELLO)


def test_format_strings_reach_no_attributes(make):
    assert make("{{ '<{0.__class__}>'.format(messages) }}").render(HELLO) == "<>"


def test_endless_loop_is_stopped_and_the_worker_replaced(make):
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = make("{% if loop_now %}" + loop + "{% endif %}x", limits=TemplateLimits(seconds=2.0))
    with pytest.raises(TemplateError, match="longer than 2 s"):
        template.render(HELLO, loop_now=True)
    assert template.render(HELLO) == "x"
    os.kill(template._worker._process.pid, signal.SIGKILL)
    with pytest.raises(TemplateError, match="process"):
        template.render(HELLO)
    assert template.render(HELLO) == "x"


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="reads /proc")
def test_worker_sees_no_secrets_and_may_not_start_or_write(make, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    template = make("x")
    template.warm()
    template.render(HELLO)
    with open(f"/proc/{template._worker._process.pid}/environ", "rb") as file:
        assert b"secret" not in file.read()
    with open(f"/proc/{template._worker._process.pid}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert limits["Max file size"] == limits["Max processes"] == "0"


def test_tools_need_a_template_that_takes_them(make):
    tools = [{"name": "f"}]
    with pytest.raises(TemplateError, match="does not take tools"):
        make("{{ messages[0].content }}").render(HELLO, tools=tools)
    two = make({"default": "plain", "tool_use": "with {{ tools | length }}"})
    assert two.render(HELLO) == "plain"
    assert two.render(HELLO, tools=tools) == "with 1"


def test_malformed_arguments(make):
    template = make(CHATML)
    for messages in ([], "hello", [{"content": "x"}], ["x"], [{"role": "user", "content": 3}]):
        with pytest.raises(RequestError, match="messages"):
            template.render(messages)
    with pytest.raises(RequestError, match="reserved"):
        template.render(HELLO, eos_token="x")
    with pytest.raises(RequestError, match="plain JSON"):
        template.render(HELLO, variable=object())
    with pytest.raises(TemplateError, match="only: other"):
        make({"other": "x"}).render(HELLO)


@pytest.mark.parametrize(
    ("code", "message"), [("raise SystemExit(1)", "ended at once"), ("input()", "is not ready after")]
)
def test_a_process_that_does_not_start_is_not_the_templates_fault(make, tmp_path, monkeypatch, code, message):
    (tmp_path / "worker.py").write_text(code)
    monkeypatch.setattr(chat_template, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(chat_template, "START_SECONDS", 30.0 if "ended" in message else 0.1)
    with pytest.raises(TemplateError, match=f"the process that renders chat templates {message}"):
        make(CHATML).render(HELLO)


def test_load_from_each_place(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"

    def rendered(value):
        config.write_text(json.dumps({"chat_template": value, "bos_token": {"content": "<s>"}}))
        template = ChatTemplate.load(tmp_path)
        try:
            return template.render(HELLO)
        finally:
            template.close()

    assert rendered("{{ bos_token }}a") == "<s>a"
    assert rendered([{"name": "default", "template": "b"}, {"name": "rag", "template": "c"}]) == "b"
    for wrong in (3, ["x"], [{"name": "default"}]):
        with pytest.raises(CheckpointError, match="chat_template must be"):
            rendered(wrong)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered("config") == "file"
