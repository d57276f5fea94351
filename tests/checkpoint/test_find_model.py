"""From what the user calls a model to its folder."""

import pytest

from moestream.checkpoint.find import find_model
from moestream.errors import CheckpointError


def test_what_is_not_a_model_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"hf download Qwen/Qwen3\.5-35B-A3B$"):
        find_model("Qwen/Qwen3.5-35B-A3B")
    for wrong in (tmp_path / "nothing", tmp_path / "file", "./nothing/here", "../nothing", "a/b/c", "~nobody/here"):
        with pytest.raises(CheckpointError, match="is not a model folder"):
            find_model(wrong)


@pytest.mark.parametrize("name", ["a" * 300, "Tell me a story. " * 500, "a\0b", "a" * 300 + "/b", "\udcff", ""])
def test_any_string_gets_a_clear_error(name):
    with pytest.raises(CheckpointError, match=r"is not a model folder|is neither a folder nor downloaded") as caught:
        find_model(name)
    assert len(str(caught.value).split("hf download")[0]) < 400


@pytest.mark.parametrize(
    ("variable", "inside"),
    [
        ("HF_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
        ("HOME", ".cache/huggingface/hub"),
    ],
)
def test_downloaded_model_is_found_by_its_id(tmp_path, monkeypatch, variable, inside):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    snapshot = tmp_path / inside / "models--some--tiny" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc123\n")
    assert find_model("some/tiny") == snapshot
    with pytest.raises(CheckpointError, match="hf download some/other"):
        find_model("some/other")
