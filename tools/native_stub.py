"""Write src/moestream/_native.pyi from the installed extension, or check that it is current.

The stub is committed so that `mypy --strict src` and editors work without a build. nanobind writes it.

Usage: python tools/native_stub.py [--check]   (in an environment with nanobind and moestream installed)
"""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path

from nanobind.stubgen import StubGen

STUB = Path(__file__).resolve().parent.parent / "src" / "moestream" / "_native.pyi"
HEADER = "# Written by tools/native_stub.py; do not edit.\n"


def generate() -> str:
    """The stub of the installed ``moestream._native``."""
    module = importlib.import_module("moestream._native")
    writer = StubGen(module)
    writer.put(module)
    return HEADER + writer.get()


def main(argv: list[str]) -> int:
    """Write the stub; with ``--check`` only compare, and exit with 1 when it is stale."""
    text = generate()
    if "--check" not in argv:
        STUB.write_text(text)
        return 0
    old = STUB.read_text() if STUB.exists() else ""
    diff = difflib.unified_diff(old.splitlines(), text.splitlines(), "committed", "generated", lineterm="")
    lines = list(diff)
    print("\n".join(lines) or "stub: current")
    if lines:
        print("run: python tools/native_stub.py")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
