"""Write the flag tables of docs/cli.md from the command line itself, or check that they are current.

Everything between the two marker lines is generated; the text around them is written by hand.

Usage: python tools/cli_reference.py [--check]   (in an environment with moestream installed)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from typer.main import get_command

from moestream.cli.main import app

DOC = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
BEGIN, END = "<!-- flags: written by tools/cli_reference.py -->", "<!-- end of flags -->"


def row(param: Any) -> str:
    """One table row of a flag or argument."""
    names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    if param.param_type_name == "argument":
        names = f"`{(param.metavar or param.name).strip('[]').upper()}`"
    value = "" if getattr(param, "is_flag", False) or param.param_type_name == "argument" else param.type.name.upper()
    if param.metavar and value:
        value = param.metavar
    default = param.show_default if isinstance(param.show_default, str) else param.default
    shown = "" if default in (None, False, ()) or callable(default) else f"`{default}`"
    cells = (names, value.replace("|", r"\|"), (param.help or "").replace("|", r"\|"), shown)
    return f"| {' | '.join(cells)} |"


def generate() -> str:
    """All commands, each with its summary and table."""
    lines: list[str] = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        lines += [f"### {name}", "", (command.help or "").strip(), "", "| flag | value | meaning | default |"]
        lines += ["|---|---|---|---|", *(row(p) for p in command.params if p.name != "help"), ""]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Rewrite the generated part; with ``--check`` only compare, and exit with 1 when it is stale."""
    text = DOC.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    new = f"{head}{BEGIN}\n\n{generate()}\n{END}{tail}"
    if "--check" not in argv:
        DOC.write_text(new)
        return 0
    print("docs/cli.md: current" if new == text else "docs/cli.md is stale; run: python tools/cli_reference.py")
    return 0 if new == text else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
