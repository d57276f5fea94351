"""qwen3_moe: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder. Full attention in every layer, no shared expert."""

from __future__ import annotations

from moestream.models.config import (
    AttentionShape,
    Fields,
    LayerPlan,
    ModelConfig,
    MoeShape,
    active_experts,
    heads,
    layer_count,
    rope,
    rotary_dim,
)
from moestream.models.names import TensorNames

MODEL_TYPES = ("qwen3_moe",)
NAMES = TensorNames(prefixes=("model.",), heads=("lm_head",), ignored=())


def parse(root: Fields) -> ModelConfig:
    """Read ``config.json``.

    Raises:
        ModelConfigError: a field is missing, has the wrong type, or holds a value we do not run.
    """
    c = root
    c.only("hidden_act", "silu")
    for bias in ("attention_bias", "qkv_bias", "use_sliding_window"):
        c.only(bias, False)
    c.only("use_qk_norm", True)
    query_heads, kv_heads, head_dim = heads(c)
    theta, factor = rope(c)
    experts = c.integer("num_experts")
    dense = set(c.integers("mlp_only_layers", []))
    step = c.integer("decoder_sparse_step", 1)
    layers = tuple(
        LayerPlan("attention", "dense" if i in dense or (i + 1) % step else "moe") for i in range(layer_count(c))
    )
    return ModelConfig(
        model_type="qwen3_moe",
        hidden_size=c.integer("hidden_size"),
        layers=layers,
        vocab_size=c.integer("vocab_size"),
        eps=c.number("rms_norm_eps"),
        attention=AttentionShape(query_heads, kv_heads, head_dim, rotary_dim(c, head_dim, factor), theta, gated=False),
        delta_net=None,
        moe=MoeShape(
            experts=experts,
            active=active_experts(c, experts),
            intermediate=c.integer("moe_intermediate_size"),
            shared_intermediate=0,
            renormalise=c.boolean("norm_topk_prob", False),
        ),
        dense_intermediate=c.integer("intermediate_size") if any(layer.mlp == "dense" for layer in layers) else 0,
        tied=c.boolean("tie_word_embeddings", False),
        zero_centred_norms=False,
        eos_ids=tuple(c.integers("eos_token_id", [])),
        max_positions=c.integer("max_position_embeddings"),
    )
