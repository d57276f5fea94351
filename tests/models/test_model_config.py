"""Reading config.json: what is accepted, and that each refusal names the field."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from typing import Any

import pytest
from golden_models import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st

from moestream.errors import ModelConfigError
from moestream.models.config import LayerPlan
from moestream.models.registry import parse_config

HYBRID = json.loads((FOLDER / "qwen3_5-bf16-fused" / "config.json").read_text())
FLAT = json.loads((FOLDER / "qwen3_5-f32-single" / "config.json").read_text())
PLAIN = json.loads((FOLDER / "qwen3-f16-single" / "config.json").read_text())

ATTENTION, DELTA_NET, DENSE = (
    LayerPlan("attention", "moe"),
    LayerPlan("delta_net", "moe"),
    LayerPlan("attention", "dense"),
)


def changed(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A copy with text fields replaced; None removes a field."""
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    for name, value in fields.items():
        text[name] = value
        if value is None:
            del text[name]
    return config


def test_multimodal_and_flat_configs_describe_the_same_kind() -> None:
    nested, _ = parse_config(HYBRID)
    flat, _ = parse_config(HYBRID["text_config"] | {"tie_word_embeddings": False})
    assert nested == flat
    assert nested.layers == (DELTA_NET, ATTENTION, DELTA_NET)
    assert nested.attention.gated
    assert nested.attention.rotary_dim == 8
    assert nested.delta_net is not None
    assert nested.delta_net.channels == 2 * 2 * 32 + 4 * 48
    assert nested.moe.renormalise
    assert nested.zero_centred_norms
    assert parse_config(FLAT)[0].tied


def test_mlp_only_layers_and_sparse_step_are_dense() -> None:
    assert parse_config(PLAIN)[0].layers == (ATTENTION, DENSE, ATTENTION)
    config, _ = parse_config(changed(PLAIN, decoder_sparse_step=3, mlp_only_layers=[2]))
    assert config.layers == (DENSE, DENSE, DENSE)
    assert config.dense_intermediate == PLAIN["intermediate_size"]


def test_layer_types_default_to_every_fourth_full_attention() -> None:
    config, _ = parse_config(changed(HYBRID, layer_types=None, num_hidden_layers=9))
    assert [i for i, layer in enumerate(config.layers) if layer == ATTENTION] == [3, 7]


def test_rope_is_read_in_old_and_new_form() -> None:
    new = parse_config(HYBRID)[0].attention
    old = changed(HYBRID, rope_parameters=None, rope_theta=1e7, partial_rotary_factor=0.25)
    assert parse_config(old)[0].attention == new
    modern = changed(PLAIN, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert parse_config(modern)[0] == parse_config(PLAIN)[0]


def test_eos_is_one_id_or_several() -> None:
    assert parse_config(PLAIN)[0].eos_ids == (159, 158)
    assert parse_config(HYBRID)[0].eos_ids == (159,)


REQUIRED = {
    "hybrid": (
        HYBRID,
        "hidden_size num_hidden_layers vocab_size num_attention_heads rms_norm_eps num_experts num_experts_per_tok "
        "moe_intermediate_size shared_expert_intermediate_size linear_num_key_heads linear_num_value_heads "
        "linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim max_position_embeddings",
    ),
    "plain": (
        PLAIN,
        "hidden_size num_hidden_layers vocab_size num_attention_heads rms_norm_eps num_experts num_experts_per_tok "
        "moe_intermediate_size intermediate_size rope_theta max_position_embeddings",
    ),
}
MISSING = [(config, name) for config, names in REQUIRED.values() for name in names.split()]


@pytest.mark.parametrize(("config", "name"), MISSING, ids=[f"{c['model_type']}-{n}" for c, n in MISSING])
@pytest.mark.parametrize("value", [None, "12", 0, -3, True])
def test_missing_and_mistyped_fields_are_named(config: dict[str, Any], name: str, value: object) -> None:
    with pytest.raises(ModelConfigError, match=rf"config\.json: (text_config\.)?{name} "):
        parse_config(changed(config, **{name: value}))


@pytest.mark.parametrize(
    ("config", "fields", "named"),
    [
        (HYBRID, {"hidden_act": "gelu"}, "hidden_act"),
        (HYBRID, {"attention_bias": True}, "attention_bias"),
        (HYBRID, {"attn_output_gate": False}, "attn_output_gate"),
        (HYBRID, {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (HYBRID, {"layer_types": ["full_attention"]}, "layer_types"),
        (HYBRID, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        (HYBRID, {"layer_types": [1, 2, 3]}, "layer_types"),
        (HYBRID, {"linear_num_value_heads": 3}, "linear_num_value_heads"),
        (HYBRID, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (HYBRID, {"num_experts_per_tok": 8}, "num_experts_per_tok"),
        (HYBRID, {"head_dim": 1025}, "head_dim must be at most 1024"),
        (HYBRID, {"linear_conv_kernel_dim": 17}, "linear_conv_kernel_dim must be at most 16"),
        (HYBRID, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        (HYBRID, {"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        (PLAIN, {"rope_theta": 10**400}, "rope_theta"),
        (HYBRID, {"rope_parameters": [1]}, "rope_parameters"),
        (HYBRID, {"num_hidden_layers": 10**12, "layer_types": None}, "num_hidden_layers"),
        (HYBRID, {"eos_token_id": "end"}, "eos_token_id"),
        (HYBRID, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (HYBRID, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (PLAIN, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        (PLAIN, {"attention_bias": True}, "attention_bias"),
        (PLAIN, {"use_sliding_window": True}, "use_sliding_window"),
        (PLAIN, {"partial_rotary_factor": 0.1}, "partial_rotary_factor"),
        (PLAIN, {"mlp_only_layers": ["1"]}, "mlp_only_layers"),
        (PLAIN, {"norm_topk_prob": 1}, "norm_topk_prob"),
    ],
)
def test_values_we_do_not_run_are_named(config: dict[str, Any], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelConfigError, match=named):
        parse_config(changed(config, **fields))


@pytest.mark.parametrize("model_type", [None, "llama", 7, ["qwen3_moe"]])
def test_unknown_model_types_list_the_supported_ones(model_type: object) -> None:
    with pytest.raises(ModelConfigError, match="model_type") as caught:
        parse_config(changed(PLAIN, model_type=model_type))
    if model_type is not None:
        assert "qwen3_5_moe_text" in str(caught.value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -0.0, 1e-320]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_theta", "type"]), inner),
    max_leaves=4,
)


@pytest.mark.parametrize("config", [HYBRID, PLAIN], ids=["hybrid", "plain"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_values_are_accepted_or_refused(config: dict[str, Any], data: st.DataObject) -> None:
    names = sorted({*config.get("text_config", config), "text_config", "rope_theta", "rope_scaling", "rope_parameters"})
    fields = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    mutated = copy.deepcopy(config)
    mutated.get("text_config", mutated).update({n: v for n, v in fields.items() if n != "text_config"})
    mutated.update({n: v for n, v in fields.items() if n == "text_config"})
    with suppress(ModelConfigError):
        parsed, _ = parse_config(mutated)
        assert parsed.moe.active <= parsed.moe.experts
