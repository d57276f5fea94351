"""Published model shapes, and the tensors an MLX checkpoint of such a model holds. Used to write synthetic weights.

Letters: as in ``ops/base.py``; C and the delta-net widths as in the model's config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moestream.errors import ConfigError

Config = dict[str, Any]
ROUTER_BITS = 8
"""MLX keeps router and shared-expert gate of qwen3_5_moe at 8 bits, group 64, whatever the rest has."""
ROUTER_GROUP = 64


@dataclass(frozen=True, slots=True)
class Planned:
    """One module to write: a matrix (or stack) in the file's encoding, or a plain vector."""

    path: str
    shape: tuple[int, ...]
    fill: Literal["matrix", "router", "ones", "conv", "log_decay"]


def _qwen3(**sizes: Any) -> Config:
    """A qwen3_moe config; see Qwen/Qwen3-30B-A3B."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "eos_token_id": sizes["vocab_size"] - 1,
        "hidden_act": "silu",
        "intermediate_size": 3 * sizes["hidden_size"],
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        **sizes,
    }


def _qwen3_5(**sizes: Any) -> Config:
    """A qwen3_5_moe config; see Qwen/Qwen3.5-397B-A17B."""
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "attention_bias": False,
            "attn_output_gate": True,
            "eos_token_id": sizes["vocab_size"] - 1,
            "full_attention_interval": 4,
            "hidden_act": "silu",
            "linear_conv_kernel_dim": 4,
            "mamba_ssm_dtype": "float32",
            "max_position_embeddings": 262144,
            "mlp_only_layers": [],
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.25,
            },
            **sizes,
        },
        "tie_word_embeddings": False,
    }


GEOMETRIES: dict[str, Config] = {
    "qwen3-30b-a3b": _qwen3(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, vocab_size=151936,
    ),
    "qwen3.5-397b": _qwen3_5(
        hidden_size=4096, num_hidden_layers=60, num_attention_heads=32, num_key_value_heads=2, head_dim=256,
        linear_num_key_heads=16, linear_num_value_heads=64, linear_key_head_dim=128, linear_value_head_dim=128,
        num_experts=512, num_experts_per_tok=10, moe_intermediate_size=1024, shared_expert_intermediate_size=1024,
        vocab_size=248320,
    ),
    "tiny-qwen3": _qwen3(
        hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=16, num_experts_per_tok=3, moe_intermediate_size=128, vocab_size=512,
    ),
    "tiny-qwen3.5": _qwen3_5(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=64,
        num_experts=16, num_experts_per_tok=3, moe_intermediate_size=128, shared_expert_intermediate_size=128,
        vocab_size=512,
    ),
}  # fmt: skip


def geometry(name: str, layers: int | None = None) -> Config:
    """The config.json of a published shape, optionally with another number of layers.

    Raises:
        ConfigError: the name is unknown or the number of layers is below 1.
    """
    if name not in GEOMETRIES:
        raise ConfigError(f"unknown synthetic model {name!r}: choose from {', '.join(GEOMETRIES)}")
    config = {**GEOMETRIES[name]}
    if layers is not None and layers < 1:
        raise ConfigError(f"layers must be at least 1, got {layers}")
    if "text_config" in config:
        config["text_config"] = text = {**config["text_config"]}
    else:
        text = config
    count = text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    if "full_attention_interval" in text:
        every = text["full_attention_interval"]
        kinds = ("linear_attention", "full_attention")
        text["layer_types"] = [kinds[(i + 1) % every == 0] for i in range(count)]
    return config


def plan_tensors(config: Config) -> Iterator[Planned]:
    """Every module of the MLX checkpoint of a config from ``geometry``, in file order."""
    hybrid = "text_config" in config
    c = config["text_config"] if hybrid else config
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    root = "language_model." if hybrid else ""
    yield Planned(f"{root}model.embed_tokens", (vocab, hidden), "matrix")
    for i in range(c["num_hidden_layers"]):
        at = f"{root}model.layers.{i}."
        yield Planned(f"{at}input_layernorm.weight", (hidden,), "ones")
        linear = hybrid and c["layer_types"][i] == "linear_attention"
        yield from _delta_net(c, f"{at}linear_attn.") if linear else _attention(c, f"{at}self_attn.", gated=hybrid)
        yield Planned(f"{at}post_attention_layernorm.weight", (hidden,), "ones")
        yield from _moe(c, f"{at}mlp.", shared=hybrid)
    yield Planned(f"{root}model.norm.weight", (hidden,), "ones")
    yield Planned(f"{root}lm_head", (vocab, hidden), "matrix")


def _attention(c: Config, at: str, gated: bool) -> Iterator[Planned]:
    """Grouped-query attention; with a gate, q_proj has twice the rows."""
    hidden, dim = c["hidden_size"], c["head_dim"]
    queries, values = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    yield Planned(f"{at}q_proj", (queries * (2 if gated else 1), hidden), "matrix")
    yield Planned(f"{at}k_proj", (values, hidden), "matrix")
    yield Planned(f"{at}v_proj", (values, hidden), "matrix")
    yield Planned(f"{at}o_proj", (hidden, queries), "matrix")
    yield Planned(f"{at}q_norm.weight", (dim,), "ones")
    yield Planned(f"{at}k_norm.weight", (dim,), "ones")


def _delta_net(c: Config, at: str) -> Iterator[Planned]:
    """Gated delta-net."""
    hidden, heads = c["hidden_size"], c["linear_num_value_heads"]
    keys, values = c["linear_num_key_heads"] * c["linear_key_head_dim"], heads * c["linear_value_head_dim"]
    channels = 2 * keys + values
    yield Planned(f"{at}in_proj_qkv", (channels, hidden), "matrix")
    yield Planned(f"{at}in_proj_z", (values, hidden), "matrix")
    yield Planned(f"{at}in_proj_b", (heads, hidden), "matrix")
    yield Planned(f"{at}in_proj_a", (heads, hidden), "matrix")
    yield Planned(f"{at}conv1d.weight", (channels, c["linear_conv_kernel_dim"], 1), "conv")
    yield Planned(f"{at}A_log", (heads,), "log_decay")
    yield Planned(f"{at}dt_bias", (heads,), "ones")
    yield Planned(f"{at}norm.weight", (c["linear_value_head_dim"],), "ones")
    yield Planned(f"{at}out_proj", (hidden, values), "matrix")


def _moe(c: Config, at: str, shared: bool) -> Iterator[Planned]:
    """Router, stacked experts, and the shared expert where the model has one."""
    hidden, experts, width = c["hidden_size"], c["num_experts"], c["moe_intermediate_size"]
    yield Planned(f"{at}gate", (experts, hidden), "router" if shared else "matrix")
    yield Planned(f"{at}switch_mlp.gate_proj", (experts, width, hidden), "matrix")
    yield Planned(f"{at}switch_mlp.up_proj", (experts, width, hidden), "matrix")
    yield Planned(f"{at}switch_mlp.down_proj", (experts, hidden, width), "matrix")
    if shared:
        common = c["shared_expert_intermediate_size"]
        yield Planned(f"{at}shared_expert.gate_proj", (common, hidden), "matrix")
        yield Planned(f"{at}shared_expert.up_proj", (common, hidden), "matrix")
        yield Planned(f"{at}shared_expert.down_proj", (hidden, common), "matrix")
        yield Planned(f"{at}shared_expert_gate", (1, hidden), "router")
