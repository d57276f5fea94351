"""Check that files stay near 400 lines and functions near 60.

Up to 450 lines a file only gets a warning, so that a small fix never forces a split; above it, and for functions
above 80 lines, the check fails. C++ functions are found by their layout (clang-format keeps top-level braces in
column 0), which is why the format check runs too.

Usage: python tools/check_sizes.py [ROOT]
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("src", "native", "tests", "tools", "benchmarks")
SUFFIXES = (".py", ".cpp", ".h")
SOFT_LINES, MAX_LINES, MAX_FUNCTION = 400, 450, 80
GENERATED: frozenset[str] = frozenset({"src/moestream/_native.pyi"})
"""Files nobody writes by hand; they may have any length."""


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, lines) of every function, methods and nested ones included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def cpp_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(signature, first line, lines) of every top-level function of a clang-formatted file."""
    start, head = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("}") and start:
            if "(" in head:
                yield head, start, number - start + 1
            start = 0
        elif re.match(r"[A-Za-z_]", line) and not re.match(r"(namespace|struct|class|enum|union|using)\b", line):
            start, head = number, line.strip()
            if line.rstrip().endswith((";", "}")):
                start = 0


def check(root: Path) -> tuple[list[str], list[str]]:
    """(problems, warnings) of the tree under ``root``."""
    problems: list[str] = []
    warnings: list[str] = []
    for path in sorted(p for folder in FOLDERS for p in (root / folder).rglob("*") if p.suffix in SUFFIXES):
        name = path.relative_to(root).as_posix()
        if name in GENERATED:
            continue
        text = path.read_text()
        lines = text.count("\n")
        if lines > MAX_LINES:
            problems.append(f"{name}: {lines} lines, at most {MAX_LINES}; split it by subject")
        elif lines > SOFT_LINES:
            warnings.append(f"{name}: {lines} lines, over the soft cap of {SOFT_LINES}")
        functions = python_functions if path.suffix == ".py" else cpp_functions
        problems += [
            f"{name}:{line}: {function} has {length} lines, at most {MAX_FUNCTION}"
            for function, line, length in functions(text)
            if length > MAX_FUNCTION
        ]
    return problems, warnings


def main(argv: list[str]) -> int:
    """Print problems and warnings; the exit status is 1 if there are problems."""
    problems, warnings = check(Path(argv[0]) if argv else Path(__file__).resolve().parent.parent)
    for line in problems:
        print(line)
    for line in warnings:
        print(f"warning: {line}")
    print(f"sizes: {len(problems)} problems, {len(warnings)} warnings")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
