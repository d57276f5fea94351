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
    code = code.replace("max_tokens=200", "max_tokens=200, ignore_eos=True")  # a random model may end at once
    names: dict[str, object] = {}
    exec(compile(code, page, "exec"), names)
    assert "LLM" in names
    assert capsys.readouterr().out.strip()


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
