"""What the documentation shows really runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.filterwarnings("ignore:slow fallback")  # of an install without a compiler
@pytest.mark.parametrize("page", ["README.md", "docs/library.md", "docs/traces.md"])
def test_python_blocks_run(page, model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(BLOCK.findall((ROOT / page).read_text()))
    code = code.replace('"path/to/model"', repr(str(model))).replace('"8GB"', '"1GB"')
    names: dict[str, object] = {}
    exec(compile(code, page, "exec"), names)
    assert "LLM" in names
    assert capsys.readouterr().out  # a random model may say nothing but the end of a line


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
