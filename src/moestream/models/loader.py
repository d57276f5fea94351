"""Builds a model: reads all resident weights in one go and hands them to a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moestream.checkpoint.encoding import Extent
from moestream.checkpoint.index import Checkpoint
from moestream.checkpoint.safetensors import TensorEntry
from moestream.models.blocks import Attention, DeltaNet, DenseMlp, ExpertSource, Mixer, Mlp, Moe, SwiGlu
from moestream.models.config import ModelConfig
from moestream.models.embedding import Embedding, TableOnDisk
from moestream.models.model import Layer, Model, Weights
from moestream.models.weights import BlockWeights, LayerWeights, WeightMap
from moestream.ops.base import F32, U8, AttentionParams, DeltaNetParams, Matrix, Ops

ReadExtents = Callable[[Sequence[Extent]], Sequence[U8]]
"""Reads byte ranges of the checkpoint's files, one 1-D array each."""


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: WeightMap,
    ops: Ops,
    experts: ExpertSource,
    read: ReadExtents,
    active_experts: int | None = None,
    embed_on_disk: bool = False,
) -> Model:
    """Make a checkpoint runnable.

    Args:
        checkpoint: the opened folder.
        config: from ``parse_config``.
        weights: from ``map_weights``.
        ops: the backend that computes.
        experts: where routed experts come from.
        read: reads every resident matrix in one call.
        active_experts: experts per token if not the model's own k (lossy).
        embed_on_disk: read the embedding's rows when they are needed; not for a table that is the head, too.

    Raises:
        ReadError: the disk failed or a file became shorter.
        ConfigError: ``active_experts`` is more than the model has.
    """
    specs = list(weights.matrices(embed=not embed_on_disk))
    arrays = iter(read([extent for spec in specs for extent in spec.parts]))
    matrices = {spec.name: ops.matrix(spec.layout, [next(arrays) for _ in spec.parts]) for spec in specs}
    build = _Builder(checkpoint, config, weights, matrices, ops)
    joined = Weights(
        embed=_embedding(checkpoint, weights, matrices, ops),
        layers=tuple(build.layer(layer) for layer in weights.layers),
        norm=build.norm(weights.norm),
        head=matrices[(weights.head or weights.embed).name],
    )
    return Model(config, ops, joined, experts, active_experts)


def _embedding(checkpoint: Checkpoint, weights: WeightMap, matrices: dict[str, Matrix], ops: Ops) -> Embedding:
    table = matrices.get(weights.embed.name)
    if table is None:
        return TableOnDisk(weights.embed, checkpoint.files, ops)
    return lambda batch: ops.embed(batch.ids, table)


class _Builder:
    """Joins loaded matrices and small vectors into blocks."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, weights: WeightMap, matrices: dict[str, Matrix], ops: Ops
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.ops = ops
        self.norm_offset = np.float32(weights.norm_offset)
        self.matrices = matrices

    def norm(self, entry: TensorEntry) -> F32:
        """A norm weight as it is multiplied with."""
        return self.checkpoint.read_array(entry) + self.norm_offset

    def layer(self, w: LayerWeights) -> Layer:
        mixer = self.delta_net if "conv" in w.mixer.vectors else self.attention
        mlp = self.moe if "router" in w.mlp.matrices else self.dense
        return Layer(mixer(self.norm(w.mixer_norm), w.mixer), mlp(self.norm(w.mlp_norm), w.mlp))

    def attention(self, norm: F32, w: BlockWeights) -> Mixer:
        a = self.config.attention
        norms = [self.norm(w.vectors[name]) for name in ("q_norm", "k_norm")]
        params = AttentionParams(a.heads, a.kv_heads, a.head_dim, a.rotary_dim, a.gated, self.config.eps, *norms)
        fields = self.fields(w)
        return Attention(norm, **fields, params=params, step=self.ops.attention_step(norm, **fields, p=params))

    def delta_net(self, norm: F32, w: BlockWeights) -> Mixer:
        d = self.config.delta_net
        assert d is not None  # the parser sets it where a layer uses it
        conv, a_log, dt_bias, value_norm = (
            self.checkpoint.read_array(w.vectors[name]) for name in ("conv", "a_log", "dt_bias", "norm")
        )
        params = DeltaNetParams(
            key_heads=d.key_heads,
            value_heads=d.value_heads,
            key_dim=d.key_dim,
            value_dim=d.value_dim,
            eps=self.config.eps,
            conv=np.ascontiguousarray(conv.reshape(d.channels, d.conv_width)),
            neg_exp_a=-np.exp(a_log),
            dt_bias=dt_bias,
            norm=value_norm,
        )
        fields = self.fields(w)
        return DeltaNet(norm, **fields, params=params, step=self.ops.delta_net_step(norm, **fields, p=params))

    def moe(self, norm: F32, w: BlockWeights) -> Mlp:
        fields = self.fields(w)
        router, shared_gate = fields.pop("router"), fields.pop("shared_gate", None)
        shared = SwiGlu(**fields) if fields else None
        eps, renormalise = self.config.eps, self.config.moe.renormalise
        route = self.ops.route_step(norm, eps, router, shared_gate, renormalise)
        return Moe(norm, eps, router, shared, shared_gate, renormalise, route)

    def dense(self, norm: F32, w: BlockWeights) -> Mlp:
        return DenseMlp(norm, self.config.eps, SwiGlu(**self.fields(w)))

    def fields(self, w: BlockWeights) -> dict[str, Matrix]:
        return {field: self.matrices[spec.name] for field, spec in w.matrices.items()}
