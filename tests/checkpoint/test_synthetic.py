"""Synthetic checkpoints open like real ones, hold sane weights, and appear whole or not at all."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
from checkpoint_build import read_range

from moestream.checkpoint import quant
from moestream.checkpoint.encoding import Encoding
from moestream.checkpoint.geometry import geometry
from moestream.checkpoint.index import open_checkpoint
from moestream.checkpoint.safetensors import pread_exact
from moestream.checkpoint.synthetic import synthetic_nbytes, write_synthetic
from moestream.errors import CheckpointError, ConfigError
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights

TINY = ["tiny-qwen3", "tiny-qwen3.5"]


@pytest.mark.parametrize("encoding", [Encoding("affine", 4, 64), Encoding("affine", 3, 32, "f16")], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_every_tensor_has_its_use(tmp_path, name, encoding):
    """A tensor the architecture does not know would be a warning, which fails the test."""
    write_synthetic(tmp_path / "m", name, encoding=encoding)
    checkpoint = open_checkpoint(tmp_path / "m")
    config, names = parse_config(checkpoint.config)
    weights = map_weights(checkpoint, config, names)
    assert weights.norm_offset == 0
    assert weights.embed.layout.encoding == encoding
    assert set(weights.experts) == set(config.moe_layers)
    used = weights.dense_nbytes + sum(t.num_experts * t.layout.nbytes for t in weights.experts.values())
    vectors = sum(t.nbytes for t in checkpoint.tensors.values() if t.dtype in ("BF16", "F32") and len(t.shape) != 2)
    assert used < sum(t.nbytes for t in checkpoint.tensors.values()) < used + vectors + 1
    assert synthetic_nbytes(name, encoding=encoding) == sum(t.nbytes for t in checkpoint.tensors.values())


@pytest.mark.parametrize("name", TINY)
def test_weights_are_sane(tmp_path, name):
    write_synthetic(tmp_path / "m", name)
    checkpoint = open_checkpoint(tmp_path / "m")
    config, names = parse_config(checkpoint.config)
    weights = map_weights(checkpoint, config, names)
    for spec in weights.matrices():
        w = quant.decode(spec.layout, checkpoint.read_matrix(spec))
        assert w.std() == pytest.approx(spec.layout.cols**-0.5, rel=0.15)
        assert abs(w.mean()) < 0.15 * w.std()
    table = weights.experts[0]
    experts = [
        quant.decode(table.layout.gate, [read_range(checkpoint, r) for r in ranges])
        for ranges in table.ranges[:, :3].tolist()
    ]
    flat = np.stack([w.ravel() for w in experts])
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 0.1


def test_shards_seed_and_progress(tmp_path):
    seen = []
    write_synthetic(tmp_path / "a", "tiny-qwen3.5", layers=5, progress=lambda *x: seen.append(x), max_shard=1 << 20)
    write_synthetic(tmp_path / "b", "tiny-qwen3.5", layers=5)
    write_synthetic(tmp_path / "c", "tiny-qwen3.5", layers=5, seed=1)
    a, b, c = (open_checkpoint(tmp_path / n) for n in "abc")
    assert len(a.files) > 3
    assert len(b.files) == 1
    assert a.config["text_config"]["layer_types"] == [*["linear_attention"] * 3, "full_attention", "linear_attention"]
    assert set(a.tensors) == set(b.tensors)
    for name, entry in a.tensors.items():
        mine = pread_exact(a.files[entry.file], entry.offset, entry.nbytes)
        other = b.tensors[name]
        assert mine == pread_exact(b.files[other.file], other.offset, other.nbytes)
    q = "language_model.lm_head.weight"
    assert pread_exact(b.files[0], b.tensors[q].offset, 64) != pread_exact(c.files[0], c.tensors[q].offset, 64)
    total = synthetic_nbytes("tiny-qwen3.5", 5)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_published_sizes():
    """Figures of the model cards: 30.5 B parameters, and 397B's 7.08 MB experts in 60 layers of 512."""
    assert synthetic_nbytes("qwen3-30b-a3b") == pytest.approx(30.5e9 * 4.5 / 8, rel=0.01)
    layer = synthetic_nbytes("qwen3.5-397b", 8) - synthetic_nbytes("qwen3.5-397b", 4)
    assert layer / 4 == pytest.approx(512 * 7_077_888, rel=0.04)
    assert geometry("qwen3.5-397b")["text_config"]["layer_types"].count("full_attention") == 15


def test_refusals_leave_nothing(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    cases = [
        (("x", "gpt-2"), ConfigError, "unknown synthetic model 'gpt-2': choose from qwen3-30b-a3b"),
        (("x", "tiny-qwen3", 0), ConfigError, "layers must be at least 1, got 0"),
        (("x", "tiny-qwen3", 1, Encoding("bf16")), ConfigError, "synthetic weights are affine, not bf16"),
        (("x", "tiny-qwen3", 1, Encoding("affine", 5, 64)), ConfigError, "cannot be stored as affine-5 g64: "),
        (("there", "tiny-qwen3"), CheckpointError, "there: exists already"),
    ]  # fmt: skip
    for (folder, *args), error, message in cases:
        with pytest.raises(error, match=message):
            write_synthetic(tmp_path / folder, *args)
    usage = namedtuple("usage", "total used free")(10, 10, 2**30 + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"x: tiny-qwen3 needs 0.0 GB .* free; choose fewer layers"):
        write_synthetic(tmp_path / "x", "tiny-qwen3")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_interrupted_writing_leaves_nothing(tmp_path):
    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "m", "tiny-qwen3", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_config_names_the_router_override(tmp_path):
    write_synthetic(tmp_path / "m", "tiny-qwen3.5", layers=1)
    quantization = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    at = "language_model.model.layers.0.mlp"
    assert quantization == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        f"{at}.gate": {"group_size": 64, "bits": 8},
        f"{at}.shared_expert_gate": {"group_size": 64, "bits": 8},
    }
