"""The process that renders chat templates; started by ``chat_template.py``, never imported.

Templates come from strangers. jinja2's sandbox keeps them from Python's internals, but not from looping for ever or
from taking all memory; only a process of its own can be stopped from outside. One JSON object a line, both ways.

Run as ``python -P -s -S template_worker.py MEMORY`` with only ``PYTHONPATH`` in the environment.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from datetime import datetime
from typing import IO, Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CACHED_TEMPLATES = 4


def main() -> None:
    """Answer requests until standard input ends."""
    environment = build_environment()
    limit_resources(int(sys.argv[1]))
    compiled: dict[str, tuple[Any, bool]] = {}
    answers = sys.stdout.buffer
    send(answers, {"ready": True})
    for line in sys.stdin.buffer:
        send(answers, answer(environment, compiled, json.loads(line)))


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Write one message."""
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def answer(
    environment: ImmutableSandboxedEnvironment, compiled: dict[str, tuple[Any, bool]], request: dict[str, Any]
) -> dict[str, Any]:
    """``{"text": ...}`` or ``{"error": ...}``."""
    extend_cpu_limit(request["seconds"])
    try:
        source = request["template"]
        if source not in compiled:
            if len(compiled) == CACHED_TEMPLATES:
                compiled.clear()
            names = meta.find_undeclared_variables(environment.parse(source))
            compiled[source] = (environment.from_string(source), "tools" in names)
        template, takes_tools = compiled[source]
        if request["variables"].get("tools") and not takes_tools:
            return {"error": "this model's chat template does not take tools; call it without tools"}
        pieces: list[str] = []
        room = request["output"]
        for piece in template.generate(**request["variables"]):
            room -= len(piece)
            if room < 0:
                return {"error": f"the chat template wrote more than {request['output']} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except TemplateSyntaxError as error:
        return {"error": f"the chat template is not valid, line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": f"the chat template took more than {sys.argv[1]} bytes of memory"}
    except RecursionError:
        return {"error": "the chat template is nested too deeply"}
    except TemplateError as error:
        return {"error": f"the chat template failed: {str(error)[:500]}"}
    except Exception as error:  # whatever the template provoked is the template's failure
        return {"error": f"the chat template failed: {type(error).__name__}: {str(error)[:500]}"}


class Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def build_environment() -> ImmutableSandboxedEnvironment:
    """What ``transformers`` gives to chat templates."""

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # jinja2's own filter escapes HTML characters, which models must see as they are
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def limit_resources(memory: int) -> None:
    """Cap memory, and forbid writing files and starting processes, as far as the system can."""
    limits = {"RLIMIT_AS": memory, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    for name, value in limits.items():
        # macOS has no working RLIMIT_AS; the parent watches the resident size there
        with contextlib.suppress(ValueError, OSError, AttributeError):
            resource.setrlimit(getattr(resource, name), (value, value))


def extend_cpu_limit(seconds: float) -> None:
    """End a runaway render even if the parent, which normally does it, is gone."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
