"""qwen3_5_moe: gated delta-net layers between gated full-attention layers, every MLP routed with a shared expert.

Covers Qwen3.5/3.6 MoE (multimodal root with ``text_config``; the vision tower is skipped) and the flat text-only
``qwen3_5_moe_text`` (Qwen3.8-2.4T). Two forms of file exist, Hugging Face's and MLX's, which differ in prefix, in the
axes of conv1d and in whether the norms already hold 1 + w.
"""

from __future__ import annotations

from moestream.models.config import (
    AttentionShape,
    DeltaNetShape,
    Fields,
    LayerPlan,
    Mixer,
    ModelConfig,
    MoeShape,
    active_experts,
    conv_width,
    heads,
    layer_count,
    rope,
    rotary_dim,
)
from moestream.models.names import TensorNames

MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
NAMES = TensorNames(
    prefixes=("model.language_model.", "language_model.model.", "model."),
    heads=("lm_head", "language_model.lm_head", "model.lm_head"),
    ignored=("model.visual.", "visual.", "vision_tower.", "language_model.mtp.", "mtp.", "model.mtp."),
)
DEFAULT_FULL_ATTENTION_INTERVAL = 4
DEFAULT_PARTIAL_ROTARY = 0.25
MIXERS: dict[str, Mixer] = {"linear_attention": "delta_net", "full_attention": "attention"}


def parse(root: Fields) -> ModelConfig:
    """Read ``config.json``.

    Raises:
        ModelConfigError: a field is missing, has the wrong type, or holds a value we do not run.
    """
    c = root.nested("text_config") if "text_config" in root else root
    c.only("hidden_act", "silu")
    c.only("attention_bias", False)
    c.only("attn_output_gate", True)
    c.only("mlp_only_layers", [])
    query_heads, kv_heads, head_dim = heads(c)
    theta, factor = rope(c, DEFAULT_PARTIAL_ROTARY)
    delta_net = DeltaNetShape(
        key_heads=c.integer("linear_num_key_heads"),
        value_heads=c.integer("linear_num_value_heads"),
        key_dim=c.integer("linear_key_head_dim"),
        value_dim=c.integer("linear_value_head_dim"),
        conv_width=conv_width(c),
    )
    if delta_net.value_heads % delta_net.key_heads:
        raise c.error("linear_num_value_heads", f"must be a multiple of linear_num_key_heads ({delta_net.key_heads})")
    experts = c.integer("num_experts")
    layers = tuple(LayerPlan(mixer, "moe") for mixer in _mixers(c))
    return ModelConfig(
        model_type="qwen3_5_moe",
        hidden_size=c.integer("hidden_size"),
        layers=layers,
        vocab_size=c.integer("vocab_size"),
        eps=c.number("rms_norm_eps"),
        attention=AttentionShape(query_heads, kv_heads, head_dim, rotary_dim(c, head_dim, factor), theta, gated=True),
        delta_net=delta_net if any(layer.mixer == "delta_net" for layer in layers) else None,
        moe=MoeShape(
            experts=experts,
            active=active_experts(c, experts),
            intermediate=c.integer("moe_intermediate_size"),
            shared_intermediate=c.integer("shared_expert_intermediate_size"),
            renormalise=True,
        ),
        dense_intermediate=0,
        tied=c.boolean("tie_word_embeddings", root.boolean("tie_word_embeddings", False)),
        zero_centred_norms=True,
        eos_ids=tuple(c.integers("eos_token_id", root.integers("eos_token_id", []))),
        max_positions=c.integer("max_position_embeddings"),
    )


def _mixers(c: Fields) -> list[Mixer]:
    """The mixer of each layer, from ``layer_types`` or ``full_attention_interval``."""
    count = layer_count(c)
    if "layer_types" not in c:
        interval = c.integer("full_attention_interval", DEFAULT_FULL_ATTENTION_INTERVAL)
        return ["delta_net" if (i + 1) % interval else "attention" for i in range(count)]
    kinds = c.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != count:
        raise c.error("layer_types", f"must be a list of num_hidden_layers = {count} names")
    unknown = [kind for kind in kinds if not isinstance(kind, str) or kind not in MIXERS]
    if unknown:
        raise c.error("layer_types", f"holds {unknown[0]!r}; supported: {', '.join(MIXERS)}")
    return [MIXERS[kind] for kind in kinds]
