"""Check that no module imports one above it.

``ORDER`` is the layout list of ARCHITECTURE.md, top to bottom: a module may import its own package and whatever
stands below it. Imports inside functions and under ``TYPE_CHECKING`` count, because they are dependences too.

Usage: python tools/check_imports.py [SRC]   (SRC holds the package; default: src beside this folder)
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PACKAGE = "moestream"
ORDER = (
    "__main__",
    "cli",
    "server",
    "__init__",
    "llm",
    "bench",
    "text",
    "engine",
    "stored_plan",
    "plan",
    "models",
    "experts",
    "ops",
    "checkpoint",
    "system",
    "config",
    "errors",
    "demo",
    "_native",
)


def top_of(module: str) -> str:
    """The entry of ``ORDER`` that a dotted module name belongs to: ``moestream.ops.cpu`` -> ``ops``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(tree: ast.AST, module: str, is_package: bool) -> list[tuple[int, str]]:
    """Every module of the package that ``tree`` imports, with its line."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                keep = module.split(".")
                keep = keep[: len(keep) - node.level + (1 if is_package else 0)]
                base = ".".join([*keep, base]).rstrip(".")
            if base == PACKAGE:  # `from moestream import X`: a module, or a name of the package itself
                found += [(node.lineno, f"{PACKAGE}.{a.name}" if a.name in ORDER else PACKAGE) for a in node.names]
            else:
                found.append((node.lineno, base))
    return [(line, name) for line, name in found if name.split(".")[0] == PACKAGE]


def check(src: Path) -> list[str]:
    """Problems found in ``src/moestream``, one line each."""
    problems: list[str] = []
    for path in sorted((src / PACKAGE).rglob("*.py")):
        relative = path.relative_to(src).with_suffix("")
        is_package = relative.name == "__init__"
        module = ".".join(relative.parts[:-1] if is_package else relative.parts)
        own = top_of(module)
        if own not in ORDER:
            problems.append(
                f"{path}: {own} is not in ORDER of tools/check_imports.py; add it there and to ARCHITECTURE.md"
            )
            continue
        for line, name in imports_of(ast.parse(path.read_text(), str(path)), module, is_package):
            other = top_of(name)
            if other not in ORDER:
                problems.append(f"{path}:{line}: imports {name}, which is not in ORDER of tools/check_imports.py")
            elif ORDER.index(other) < ORDER.index(own):
                problems.append(f"{path}:{line}: {own} imports {name}, which is above it")
    return problems


def main(argv: list[str]) -> int:
    """Print the problems; the exit status is 1 if there are any."""
    src = Path(argv[0]) if argv else Path(__file__).resolve().parent.parent / "src"
    problems = check(src)
    print("\n".join(problems) or f"imports: {len(list((src / PACKAGE).rglob('*.py')))} files, none imports upward")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
