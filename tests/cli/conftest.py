"""A tiny checkpoint that speaks: goldens have no tokenizer, so one of single characters is put beside a copy."""

from __future__ import annotations

import json
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_models import FOLDER
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHATML = "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}assistant:"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden checkpoint of 160 tokens with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("cli") / "model"
    shutil.copytree(FOLDER / "qwen3_5-mlx4", path)
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    tokens = characters + [f"<{i}>" for i in range(160 - len(characters))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    return path


@pytest.fixture(scope="session")
def run() -> Run:
    """Run the command line in a process of its own, as a user would."""

    def run_command(*args: object, input: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moestream", *map(str, args)]
        env = os.environ | {"NO_COLOR": "1", "COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, input=input, env=env)

    return run_command
