"""How families of models write function calls: read while they are written, and as grammars that force valid ones.

``FORMATS`` is the registry: another family is one more entry. A chat template tells which one a model was trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from moestream.text.tools import PARAMETER, parameter_types, parameter_value, parse_call

Tools = Sequence[Mapping[str, Any]]
Literal = Callable[[str], str]
"""Writes a text for a Lark grammar; one that is a token of its own becomes that token."""

WHITE_SPACE = r"( |\n[ \t]{0,24})?"
"""Between the parts of forced JSON. Bounded: weak models otherwise write line feeds until their tokens are used up."""


class CallReader(Protocol):
    """Reads one call while it is written."""

    name: str | None
    """Known from some piece on, or never when the call is malformed."""

    def push(self, text: str) -> str:
        """Read on; returns the text of the arguments, a JSON object, that is certain now."""

    def finish(self) -> str:
        """The call is complete; returns the rest of the arguments."""


class ToolFormat(Protocol):
    """One way of writing calls, each between two markers."""

    opening: str
    closing: str

    def in_template(self, source: str) -> bool:
        """Whether a chat template asks for this form."""

    def reader(self, tools: Tools) -> CallReader:
        """A reader of one call."""

    def grammar(self, tools: Tools, literal: Literal) -> str:
        """Lark rules; ``call`` is any call of these functions, its arguments valid under their schemas."""


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool as OpenAI's API wraps it."""
    function: Mapping[str, Any] = tool.get("function", tool)
    return function


def parameters_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of a function's arguments."""
    return {"type": "object", **(function_of(tool).get("parameters") or {})}


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a Lark rule for JSON of a schema."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})


class Hermes:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Hermes, Qwen2.5, Qwen3)."""

    opening, closing = "<tool_call>", "</tool_call>"

    def in_template(self, source: str) -> bool:
        """Whether a chat template asks for this form."""
        return self.opening in source and "arguments" in source

    def reader(self, tools: Tools) -> CallReader:
        """A reader of one call."""
        return _HermesReader(tools)

    def grammar(self, tools: Tools, literal: Literal) -> str:
        """Lark rules; ``call`` is any call of these functions."""
        rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            head = json.dumps('\n{"name": ' + json.dumps(function_of(tool)["name"]) + ', "arguments": ')
            rules.append(f'call_{i}: {literal(self.opening)} {head} args_{i} "}}\\n" {literal(self.closing)}')
            rules.append(f"args_{i}: {json_rule(parameters_of(tool))}")
        return "\n".join(rules)


class _HermesReader:
    """Passes the text of ``arguments`` on as it is, where the usual order of the two keys allows it."""

    HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')

    def __init__(self, tools: Tools) -> None:
        self.name: str | None = None
        self._tools = tools
        self._body = ""
        self._at = 0  # where the rest of the arguments begins
        self._depth = 0
        self._string = self._escape = self._ended = False

    def push(self, text: str) -> str:
        self._body += text
        if self.name is None:
            head = self.HEAD.match(self._body)
            if head is None:
                return ""
            try:
                self.name = json.loads(head[1], strict=False)
            except ValueError:  # an escape that JSON does not know
                return ""
            self._at = head.end()
        start = self._at
        while self._at < len(self._body) and not self._ended:
            self._scan(self._body[self._at])
            self._at += 1
        return self._body[start : self._at]

    def _scan(self, char: str) -> None:
        """Follow strings and braces up to the one that ends the arguments."""
        if self._escape:
            self._escape = False
        elif self._string:
            self._escape = char == "\\"
            self._string = char != '"'
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self._ended = self._depth == 0
        else:
            self._string = char == '"'

    def finish(self) -> str:
        if self.name is not None:
            return ""
        return _whole(self, self._body, self._tools)


class Xml:
    """``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`` (Qwen3-Coder, Qwen3.5)."""

    opening, closing = "<tool_call>", "</tool_call>"

    def in_template(self, source: str) -> bool:
        """Whether a chat template asks for this form."""
        return self.opening in source and "<function=" in source and "<parameter=" in source

    def reader(self, tools: Tools) -> CallReader:
        """A reader of one call."""
        return _XmlReader(tools)

    def grammar(self, tools: Tools, literal: Literal) -> str:
        """Lark rules; ``call`` is any call of these functions, required parameters first in their order."""
        rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            schema = parameters_of(tool)
            shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
            parameters = []
            for j, (key, value) in enumerate((schema.get("properties") or {}).items()):
                optional = "" if key in (schema.get("required") or ()) else "?"
                parameters.append(f"arg_{i}_{j}{optional}")
                head = json.dumps(f"<parameter={key}>\n")
                rules.append(f"arg_{i}_{j}: {head} {_xml_value(f'{i}_{j}', value, shared, rules)}")
            head, tail = json.dumps(f"\n<function={function_of(tool)['name']}>\n"), json.dumps("</function>\n")
            body = " ".join([literal(self.opening), head, *parameters, tail, literal(self.closing)])
            rules.append(f"call_{i}: {body}")
        return "\n".join(rules)


def _xml_value(name: str, schema: Any, shared: Mapping[str, Any], rules: list[str]) -> str:
    """A parameter's value and its end tag: any text where text is declared, else JSON."""
    end = "\n</parameter>\n"
    schema = schema if isinstance(schema, Mapping) else {}
    choices = schema.get("enum")
    if schema.get("type") == "string" and isinstance(choices, list) and choices:
        return "(" + " | ".join(json.dumps(str(choice)) for choice in choices) + ") " + json.dumps(end)
    if schema.get("type") == "string":
        rules.append(f"text_{name}[suffix={json.dumps(end)}]: /(.|\\n)*/")
        return f"text_{name}"
    rules.append(f"json_{name}: {json_rule({**shared, **schema})}")
    return f"json_{name} {json.dumps(end)}"


class _XmlReader:
    """Writes each parameter as JSON when it is complete."""

    HEAD = re.compile(r"\s*<function=([^>\n]+)>")

    def __init__(self, tools: Tools) -> None:
        self.name: str | None = None
        self._tools = tools
        self._body = ""
        self._at = 0
        self._types: dict[str, Any] = {}
        self._written: set[str] = set()

    def push(self, text: str) -> str:
        self._body += text
        if self.name is None:
            head = self.HEAD.match(self._body)
            if head is None:
                return ""
            self.name, self._at = head[1].strip(), head.end()
            self._types = parameter_types(self.name, self._tools)
        pieces = []
        while (found := PARAMETER.search(self._body, self._at)) is not None:
            self._at = found.end()
            key = found[1].strip()
            if key not in self._written:  # a JSON object must not hold it twice
                value = parameter_value(found[2], self._types.get(key))
                pieces.append(f"{', ' if self._written else '{'}{json.dumps(key)}: {json.dumps(value)}")
                self._written.add(key)
        return "".join(pieces)

    def finish(self) -> str:
        if self.name is not None:
            return "}" if self._written else "{}"
        return _whole(self, self._body, self._tools)


def _whole(reader: CallReader, body: str, tools: Tools) -> str:
    """Arguments of a call whose pieces were not understood: of another form, or in another order."""
    call = parse_call(body, tools)
    if call is None:
        return ""
    reader.name = call.name
    return json.dumps(call.arguments)


FORMATS: tuple[ToolFormat, ...] = (Xml(), Hermes())
"""Asked in this order."""


def format_of(template: str) -> ToolFormat | None:
    """The form that a chat template asks for; None when it is not known."""
    return next((form for form in FORMATS if form.in_template(template)), None)
