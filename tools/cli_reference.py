"""Write the flags of docs/cli.md from the command line itself, or check that they are current.

Everything between the two marker lines is generated; the text around them is written by hand.

Usage: python tools/cli_reference.py [--check]   (in an environment with moestream installed)
"""

from __future__ import annotations

import html
import subprocess
import sys
from pathlib import Path

DOC = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
BEGIN, END = "<!-- flags: written by tools/cli_reference.py -->", "<!-- end of flags -->"


def generate() -> str:
    """All commands with their flags, as typer documents them."""
    command = [sys.executable, "-m", "typer", "moestream.cli.main", "utils", "docs", "--name", "moestream"]
    text = html.unescape(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return text[text.index("\n## ") :].replace("\n## ", "\n### ").strip()


def main(argv: list[str]) -> int:
    """Rewrite the generated part; with ``--check`` only compare, and exit with 1 when it is stale."""
    text = DOC.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    new = f"{head}{BEGIN}\n\n{generate()}\n\n{END}{tail}"
    if "--check" not in argv:
        DOC.write_text(new)
        return 0
    print("docs/cli.md: current" if new == text else "docs/cli.md is stale; run: python tools/cli_reference.py")
    return 0 if new == text else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
