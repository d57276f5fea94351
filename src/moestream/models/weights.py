"""Where each weight of a model lies in its checkpoint. Reads headers only, so planning and inspecting cost nothing.

Shape letters: as in ``ops/base.py``; additionally V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from moestream.checkpoint.encoding import ExpertTable, MatrixSpec
from moestream.checkpoint.index import Checkpoint, paused_collector
from moestream.checkpoint.safetensors import TensorEntry
from moestream.errors import TensorError
from moestream.models.config import ModelConfig
from moestream.models.names import TensorNames

MATRIX_SUFFIXES = (".weight", ".scales", ".biases")
LISTED = 5  # names shown of unexpected tensors


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Tensors of one block, by the field of the block that uses them."""

    matrices: dict[str, MatrixSpec]
    vectors: dict[str, TensorEntry]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Tensors of one layer, without its routed experts."""

    mixer_norm: TensorEntry
    mixer: BlockWeights
    mlp_norm: TensorEntry
    mlp: BlockWeights


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Tensors of a whole model."""

    embed: MatrixSpec
    layers: tuple[LayerWeights, ...]
    norm: TensorEntry
    head: MatrixSpec | None
    """None: the embedding table is the head."""
    experts: dict[int, ExpertTable]
    """Routed experts of each ``moe`` layer."""
    norm_offset: float
    """Added to stored norm weights: 1 where the file holds w of 1 + w."""

    def matrices(self, embed: bool = True) -> Iterator[MatrixSpec]:
        """Every matrix but those of routed experts once, in the order of use; ``embed``: the embedding table, too."""
        if embed:
            yield self.embed
        for layer in self.layers:
            yield from layer.mixer.matrices.values()
            yield from layer.mlp.matrices.values()
        if self.head is not None:
            yield self.head

    @property
    def dense_nbytes(self) -> int:
        """Bytes of these matrices as stored."""
        return sum(spec.layout.nbytes for spec in self.matrices())


@paused_collector()
def map_weights(checkpoint: Checkpoint, config: ModelConfig, names: TensorNames) -> WeightMap:
    """Find every tensor the model needs. Warns of tensors that nothing uses, which may mean a different model.

    Raises:
        TensorError: a tensor is missing, or its dtype, shape or encoding is wrong.
    """
    prefix = _prefix(checkpoint, names)
    hidden, vocab = config.hidden_size, config.vocab_size
    layers, experts = [], {}
    for i, plan in enumerate(config.layers):
        at = f"{prefix}layers.{i}."
        mixer = _attention if plan.mixer == "attention" else _delta_net
        mlp = _moe if plan.mlp == "moe" else _dense
        norms = [checkpoint.vector(f"{at}{name}.weight", (hidden,)) for name in (names.mixer_norm, names.mlp_norm)]
        layers.append(LayerWeights(norms[0], mixer(checkpoint, config, at), norms[1], mlp(checkpoint, config, at)))
        if plan.mlp == "moe":
            experts[i] = checkpoint.experts(f"{at}mlp", config.moe.experts, hidden, config.moe.intermediate)
    weights = WeightMap(
        embed=checkpoint.matrix(f"{prefix}{names.embed}", vocab, hidden),
        layers=tuple(layers),
        norm=checkpoint.vector(f"{prefix}{names.norm}.weight", (hidden,)),
        head=None if config.tied else checkpoint.matrix(_head(checkpoint, names), vocab, hidden),
        experts=experts,
        norm_offset=1.0 if config.zero_centred_norms and not _norms_complete(layers) else 0.0,
    )
    _warn_of_unused(checkpoint, names, prefix, weights)
    return weights


def _prefix(checkpoint: Checkpoint, names: TensorNames) -> str:
    for prefix in names.prefixes:
        if f"{prefix}{names.embed}.weight" in checkpoint.tensors:
            return prefix
    tried = ", ".join(f"{prefix}{names.embed}.weight" for prefix in names.prefixes)
    raise TensorError(f"{checkpoint.path}: the embedding is missing; looked for {tried}")


def _head(checkpoint: Checkpoint, names: TensorNames) -> str:
    for path in names.heads:
        if f"{path}.weight" in checkpoint.tensors:
            return path
    tried = ", ".join(f"{path}.weight" for path in names.heads)
    raise TensorError(f"{checkpoint.path}: the output head is missing and not tied; looked for {tried}")


def _attention(checkpoint: Checkpoint, config: ModelConfig, at: str) -> BlockWeights:
    a, hidden = config.attention, config.hidden_size
    shapes = {
        "q": (a.heads * a.head_dim * (2 if a.gated else 1), hidden),
        "k": (a.kv_heads * a.head_dim, hidden),
        "v": (a.kv_heads * a.head_dim, hidden),
        "o": (hidden, a.heads * a.head_dim),
    }
    return BlockWeights(
        {field: checkpoint.matrix(f"{at}self_attn.{field}_proj", *shape) for field, shape in shapes.items()},
        {field: checkpoint.vector(f"{at}self_attn.{field}.weight", (a.head_dim,)) for field in ("q_norm", "k_norm")},
    )


def _delta_net(checkpoint: Checkpoint, config: ModelConfig, at: str) -> BlockWeights:
    d, hidden = config.delta_net, config.hidden_size
    assert d is not None  # the parser sets it where a layer uses it
    at += "linear_attn."
    matrices = {
        "qkv": checkpoint.matrix(f"{at}in_proj_qkv", d.channels, hidden),
        "z": checkpoint.matrix(f"{at}in_proj_z", d.values, hidden),
        "b": checkpoint.matrix(f"{at}in_proj_b", d.value_heads, hidden),
        "a": checkpoint.matrix(f"{at}in_proj_a", d.value_heads, hidden),
        "out": checkpoint.matrix(f"{at}out_proj", hidden, d.values),
    }
    conv = checkpoint.tensors.get(f"{at}conv1d.weight")
    mlx = conv is not None and conv.shape[-1:] == (1,)
    vectors = {
        "conv": checkpoint.vector(
            f"{at}conv1d.weight", (d.channels, d.conv_width, 1) if mlx else (d.channels, 1, d.conv_width)
        ),
        "a_log": checkpoint.vector(f"{at}A_log", (d.value_heads,)),
        "dt_bias": checkpoint.vector(f"{at}dt_bias", (d.value_heads,)),
        "norm": checkpoint.vector(f"{at}norm.weight", (d.value_dim,)),
    }
    return BlockWeights(matrices, vectors)


def _dense(checkpoint: Checkpoint, config: ModelConfig, at: str) -> BlockWeights:
    return BlockWeights(_swiglu(checkpoint, f"{at}mlp.", config.hidden_size, config.dense_intermediate), {})


def _moe(checkpoint: Checkpoint, config: ModelConfig, at: str) -> BlockWeights:
    m, hidden = config.moe, config.hidden_size
    matrices = {"router": checkpoint.matrix(f"{at}mlp.gate", m.experts, hidden)}
    if m.shared_intermediate:
        matrices |= _swiglu(checkpoint, f"{at}mlp.shared_expert.", hidden, m.shared_intermediate)
        matrices["shared_gate"] = checkpoint.matrix(f"{at}mlp.shared_expert_gate", 1, hidden)
    return BlockWeights(matrices, {})


def _swiglu(checkpoint: Checkpoint, at: str, hidden: int, width: int) -> dict[str, MatrixSpec]:
    return {
        "gate": checkpoint.matrix(f"{at}gate_proj", width, hidden),
        "up": checkpoint.matrix(f"{at}up_proj", width, hidden),
        "down": checkpoint.matrix(f"{at}down_proj", hidden, width),
    }


def _norms_complete(layers: list[LayerWeights]) -> bool:
    """Whether norms are stored as 1 + w: MLX's own test, a convolution whose last axis is 1."""
    return any(layer.mixer.vectors["conv"].shape[-1] == 1 for layer in layers if "conv" in layer.mixer.vectors)


def _warn_of_unused(checkpoint: Checkpoint, names: TensorNames, prefix: str, weights: WeightMap) -> None:
    """Say which tensors of the text model nothing reads."""
    used = {spec.name + suffix for spec in weights.matrices() for suffix in MATRIX_SUFFIXES}
    used |= {entry.name for layer in weights.layers for entry in (layer.mixer_norm, layer.mlp_norm)}
    used |= {e.name for layer in weights.layers for block in (layer.mixer, layer.mlp) for e in block.vectors.values()}
    used.add(weights.norm.name)
    if weights.head is None:
        used |= {path + suffix for path in names.heads for suffix in MATRIX_SUFFIXES}
    experts = {f"{prefix}layers.{i}.mlp.{kind}" for i in weights.experts for kind in ("experts", "switch_mlp")}
    depth = prefix.count(".") + 4  # dots before the name of an expert's module
    unused = [
        name
        for name in checkpoint.tensors
        if name not in used
        and not name.startswith(names.ignored)
        and not (name.endswith((*MATRIX_SUFFIXES, "_proj")) and ".".join(name.split(".", depth)[:depth]) in experts)
    ]
    if unused:
        shown = ", ".join(unused[:LISTED]) + (", ..." if len(unused) > LISTED else "")
        warnings.warn(
            f"{checkpoint.path}: {len(unused)} tensors are not used: {shown}. The output is wrong if they matter",
            stacklevel=3,
        )
