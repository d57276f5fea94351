"""The repository checks find what they are for, and accept this tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(tool: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *args], capture_output=True, text=True, check=False
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_nothing_here_imports_upward() -> None:
    result = run("check_imports.py")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("moestream/ops/cpu.py", "from moestream.models.batch import Batch\n"),
        ("moestream/ops/cpu.py", "import moestream.engine.engine\n"),
        ("moestream/ops/cpu.py", "from moestream import llm\n"),
        ("moestream/ops/cpu.py", "from moestream import LLM\n"),
        ("moestream/ops/cpu.py", "from ..cli import main\n"),
        ("moestream/ops/__init__.py", "from ..cli import main\n"),
        ("moestream/errors.py", "def late():\n    from .config import RunConfig\n"),
        ("moestream/engine/engine.py", "from moestream.text.tokenizer import Tokenizer\n"),
    ],
)
def test_upward_import_fails(tmp_path: Path, file: str, text: str) -> None:
    result = run("check_imports.py", str(write(tmp_path, {file: text})))
    assert result.returncode == 1
    assert file in result.stdout
    assert "above it" in result.stdout


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("moestream/cli/main.py", "from moestream import LLM\nfrom moestream.errors import MoestreamError\n"),
        (
            "moestream/ops/cpu.py",
            "import numpy\nfrom .base import Ops\nfrom moestream.checkpoint.encoding import Kind\n",
        ),
        ("moestream/ops/__init__.py", "from .base import Ops\n"),
    ],
)
def test_downward_import_passes(tmp_path: Path, file: str, text: str) -> None:
    result = run("check_imports.py", str(write(tmp_path, {file: text})))
    assert result.returncode == 0, result.stdout


def test_unknown_module_fails(tmp_path: Path) -> None:
    result = run(
        "check_imports.py",
        str(write(tmp_path, {"moestream/novel.py": "", "moestream/cli/x.py": "import moestream.gone\n"})),
    )
    assert result.returncode == 1
    assert "novel is not in ORDER" in result.stdout
    assert "imports moestream.gone" in result.stdout


def test_long_file_fails(tmp_path: Path) -> None:
    result = run("check_sizes.py", str(write(tmp_path, {"src/a.py": "x = 1\n" * 451, "native/b.h": "int x;\n" * 430})))
    assert result.returncode == 1
    assert "src/a.py: 451 lines" in result.stdout
    assert "warning: native/b.h: 430 lines" in result.stdout


def test_long_functions_fail(tmp_path: Path) -> None:
    python = "class A:\n    def method(self):\n" + "        x = 1\n" * 80
    cpp = (
        "namespace m {\n\ntemplate <int B>\nvoid kernel(int a,\n            int b) {\n"
        + "    ++a;\n" * 80
        + "}\n\nvoid small() {\n}\n\n}  // namespace m\n"
    )
    result = run("check_sizes.py", str(write(tmp_path, {"src/a.py": python, "native/k.cpp": cpp})))
    assert result.returncode == 1
    assert "method has 81 lines" in result.stdout
    assert "void kernel(int a, has 83 lines" in result.stdout
    assert "small" not in result.stdout
