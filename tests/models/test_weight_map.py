"""Finding tensors: each that is missing or of a wrong shape is named, unexpected ones are warned of."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import pytest
from golden_models import Golden, golden

from moestream.checkpoint.index import Checkpoint
from moestream.checkpoint.safetensors import TensorEntry
from moestream.errors import TensorError
from moestream.models.registry import parse_config
from moestream.models.weights import WeightMap, map_weights


def with_tensors(checkpoint: Checkpoint, tensors: dict[str, TensorEntry]) -> Checkpoint:
    """The same checkpoint holding other tensors."""
    return dataclasses.replace(checkpoint, tensors=MappingProxyType(tensors))


def mapped(checkpoint: Checkpoint) -> WeightMap:
    return map_weights(checkpoint, *parse_config(checkpoint.config))


def test_every_tensor_is_needed(tiny: Golden) -> None:
    """Removing any tensor but the skipped ones fails with its name, so none is silently replaced by anything."""
    checkpoint = tiny.checkpoint
    for name in checkpoint.tensors:
        if name.startswith(("model.visual.", "mtp.")):
            continue
        rest = {other: entry for other, entry in checkpoint.tensors.items() if other != name}
        with pytest.raises(TensorError) as caught:
            mapped(with_tensors(checkpoint, rest))
        module = name.partition(".experts.")[0].partition(".switch_mlp.")[0]
        assert module.removesuffix(".weight").removesuffix(".scales").removesuffix(".biases") in str(caught.value)


def test_every_shape_is_checked(tiny: Golden) -> None:
    checkpoint = tiny.checkpoint
    for name, entry in checkpoint.tensors.items():
        if name.startswith(("model.visual.", "mtp.")):
            continue
        wrong = entry._replace(shape=(*entry.shape[:-1], entry.shape[-1] + 1))
        with pytest.raises(TensorError, match=r"shape"):
            mapped(with_tensors(checkpoint, {**checkpoint.tensors, name: wrong}))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.gate.e_score_correction_bias"]
)
def test_unexpected_tensors_are_warned_of(name: str) -> None:
    checkpoint = golden("qwen3-f16-single").checkpoint
    extra = next(iter(checkpoint.tensors.values()))._replace(name=name)
    with pytest.warns(UserWarning, match=name):
        mapped(with_tensors(checkpoint, {**checkpoint.tensors, name: extra}))


def test_norm_convention_follows_the_convolution() -> None:
    assert mapped(golden("qwen3_5-bf16-fused").checkpoint).norm_offset == 1.0
    assert mapped(golden("qwen3_5-mlx4").checkpoint).norm_offset == 0.0
    assert mapped(golden("qwen3-f16-single").checkpoint).norm_offset == 0.0


def test_dense_bytes_exclude_routed_experts(tiny: Golden) -> None:
    weights = mapped(tiny.checkpoint)
    routed = sum(int(table.ranges[..., 2].sum()) for table in weights.experts.values())
    stored = sum(
        entry.nbytes
        for name, entry in tiny.checkpoint.tensors.items()
        if len(entry.shape) > 1 and "conv1d" not in name and not name.startswith(("model.visual.", "mtp."))
    )
    assert weights.dense_nbytes == stored - routed
