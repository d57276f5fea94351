"""Fixtures of all areas."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads make tiny products five times slower

import pytest
from golden_models import FOLDER, NAMES, Golden, golden, make_cpu_ops
from text_models import CHATML, NAME, load, tokenizer_of

from moestream import LLM
from moestream.ops.base import Ops
from moestream.ops.reference import ReferenceOps


@pytest.fixture(params=NAMES)
def tiny(request: pytest.FixtureRequest) -> Golden:
    """Each golden checkpoint."""
    return golden(request.param)


@pytest.fixture(params=["reference", "cpu"])
def exact_ops(request: pytest.FixtureRequest) -> Ops:
    """Each backend with float32 activations."""
    return make_cpu_ops(exact=True) if request.param == "cpu" else ReferenceOps()


@pytest.fixture
def fast_ops() -> Ops:
    """The native backend with rounded activations."""
    return make_cpu_ops(exact=False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden checkpoint with a tokenizer and a chat template beside it."""
    path = tmp_path_factory.mktemp("model")
    for file in (FOLDER / NAME).iterdir():
        (path / file.name).symlink_to(file)
    tokenizer_of(160).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """That checkpoint, loaded."""
    with load(folder) as loaded:
        yield loaded
