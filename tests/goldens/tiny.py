"""Tiny random checkpoints of every architecture and storage form, and what ``transformers`` computes from them.

The tensors are written under the names and in the layouts that published files use, and ``transformers`` is given the
same values directly, so that it checks our reading of files as well as our arithmetic.

Shape letters: as in ``src/moestream/ops/base.py``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

GREEDY = 16  # steps
KEPT_EVERY = 5  # rows of per-layer activations that are stored
NOISE = 2.0**-16  # relative perturbation of the embedding that measures how a model amplifies rounding
CONV_WIDTH = 4


@dataclass(frozen=True)
class Recipe:
    """One tiny checkpoint."""

    name: str
    config: dict[str, Any]  # config.json as published files have it, without quantisation
    form: str  # "fused", "single" (one tensor per expert) or "mlx"
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    lengths: tuple[int, ...] = (131, 23, 5)
    bits: dict[str, int] = field(default_factory=dict)  # mlx: path suffix -> bits other than 4
    group: int = 64
    shards: int = 1

    @property
    def text(self) -> dict[str, Any]:
        """The fields of the text model."""
        return self.config.get("text_config", self.config)

    @property
    def hybrid(self) -> bool:
        """Whether it is qwen3_5_moe rather than qwen3_moe."""
        return self.text["model_type"].startswith("qwen3_5")


def qwen3_5_text(layers: str, **fields: Any) -> dict[str, Any]:
    """Config of a hybrid model whose mixers are given as letters: ``l`` delta-net, ``f`` full attention."""
    kinds = {"l": "linear_attention", "f": "full_attention"}
    return {
        "model_type": "qwen3_5_moe_text", "hidden_act": "silu", "rms_norm_eps": 1e-6, "vocab_size": 160,
        "num_hidden_layers": len(layers), "layer_types": [kinds[c] for c in layers],
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "attention_bias": False,
        "linear_conv_kernel_dim": CONV_WIDTH, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 64, "num_experts": 7, "num_experts_per_tok": 3,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "eos_token_id": 159,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                            "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    } | fields  # fmt: skip


def qwen3_text(layers: int, **fields: Any) -> dict[str, Any]:
    """Config of a plain attention model."""
    return {
        "model_type": "qwen3_moe", "hidden_act": "silu", "rms_norm_eps": 1e-6, "vocab_size": 160,
        "num_hidden_layers": layers, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
        "attention_bias": False, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "max_position_embeddings": 4096, "rope_theta": 1e6,
        "rope_scaling": None, "use_sliding_window": False, "tie_word_embeddings": False, "eos_token_id": [159, 158],
    } | fields  # fmt: skip


# The seeds were found by `generate.py --search`: none of their decisions is a near-tie.
RECIPES = (
    Recipe(  # as the official files: multimodal root, fused experts; two shards
        "qwen3_5-bf16-fused",
        {
            "model_type": "qwen3_5_moe", "tie_word_embeddings": False,
            "text_config": qwen3_5_text("lfl", hidden_size=120, moe_intermediate_size=40,
                                        shared_expert_intermediate_size=56, linear_value_head_dim=48),
        },
        "fused", seed=14, shards=2,
    ),
    Recipe(  # flat, text only, tied, one tensor per expert as transformers 5 saves it
        "qwen3_5-f32-single",
        qwen3_5_text("lf", hidden_size=88, moe_intermediate_size=24, shared_expert_intermediate_size=40,
                     tie_word_embeddings=True, num_attention_heads=2, num_key_value_heads=1, linear_key_head_dim=16,
                     linear_value_head_dim=24),
        "single", torch.float32, seed=13,
    ),
    Recipe(
        "qwen3_5-mlx4",
        {
            "model_type": "qwen3_5_moe", "tie_word_embeddings": False,
            "text_config": qwen3_5_text("llfl", hidden_size=192, moe_intermediate_size=64,
                                        shared_expert_intermediate_size=128, head_dim=64, num_key_value_heads=1,
                                        full_attention_interval=3),
        },
        "mlx", seed=35, bits={"mlp.gate": 8, "mlp.shared_expert_gate": 8, "lm_head": 6, "layers.2.self_attn.v_proj": 8},
    ),
    Recipe(
        "qwen3-f16-single",
        qwen3_text(3, hidden_size=104, moe_intermediate_size=40, intermediate_size=152),
        "single", torch.float16, seed=23,
    ),
    Recipe(  # as the official files
        "qwen3-bf16-single",
        qwen3_text(2, hidden_size=72, moe_intermediate_size=24, intermediate_size=88, mlp_only_layers=[0],
                   num_attention_heads=4, num_experts=5, num_experts_per_tok=2),
        "single", seed=30,
    ),
    Recipe(
        "qwen3-mlx4",
        qwen3_text(3, hidden_size=192, moe_intermediate_size=64, intermediate_size=320, norm_topk_prob=False),
        "mlx", seed=31, bits={"layers.0.mlp.switch_mlp.down_proj": 3, "embed_tokens": 2}, group=32,
    ),
)  # fmt: skip


def tensors(recipe: Recipe) -> dict[str, np.ndarray]:
    """Random float32 weights under the names of ``transformers``' text model (``model.*``, fused experts)."""
    rng = np.random.default_rng(recipe.seed)
    c = recipe.text
    hidden, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    query, kv, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    centre = 0.0 if recipe.hybrid else 1.0

    def matrix(*shape: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * gain / np.sqrt(shape[-1])).astype(np.float32)

    def norm(n: int, mean: float = centre) -> np.ndarray:
        return (mean + 0.3 * rng.standard_normal(n)).astype(np.float32)

    def swiglu(at: str, width: int) -> dict[str, np.ndarray]:
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        return {f"{at}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}

    spread = 0.2 if c["tie_word_embeddings"] else 1.0  # a tied head would otherwise only repeat its input
    out = {"model.embed_tokens.weight": matrix(c["vocab_size"], hidden, gain=spread * np.sqrt(hidden))}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        out[f"{at}input_layernorm.weight"] = norm(hidden)
        out[f"{at}post_attention_layernorm.weight"] = norm(hidden)
        if c.get("layer_types", ["full_attention"] * (i + 1))[i] == "full_attention":
            doubled = 2 if recipe.hybrid else 1
            out[f"{at}self_attn.q_proj.weight"] = matrix(query * dim * doubled, hidden)
            out[f"{at}self_attn.k_proj.weight"] = matrix(kv * dim, hidden)
            out[f"{at}self_attn.v_proj.weight"] = matrix(kv * dim, hidden)
            out[f"{at}self_attn.o_proj.weight"] = matrix(hidden, query * dim)
            out[f"{at}self_attn.q_norm.weight"] = norm(dim)
            out[f"{at}self_attn.k_norm.weight"] = norm(dim)
        else:
            heads, keys = c["linear_num_value_heads"], c["linear_num_key_heads"] * c["linear_key_head_dim"]
            values = heads * c["linear_value_head_dim"]
            out[f"{at}linear_attn.in_proj_qkv.weight"] = matrix(2 * keys + values, hidden)
            out[f"{at}linear_attn.in_proj_z.weight"] = matrix(values, hidden)
            out[f"{at}linear_attn.in_proj_b.weight"] = matrix(heads, hidden)
            out[f"{at}linear_attn.in_proj_a.weight"] = matrix(heads, hidden)
            out[f"{at}linear_attn.conv1d.weight"] = matrix(2 * keys + values, 1, CONV_WIDTH)
            out[f"{at}linear_attn.A_log"] = np.log(rng.uniform(0.1, 4.0, heads)).astype(np.float32)
            out[f"{at}linear_attn.dt_bias"] = rng.uniform(-4.0, 1.0, heads).astype(np.float32)
            out[f"{at}linear_attn.norm.weight"] = norm(c["linear_value_head_dim"], 1.0)
            out[f"{at}linear_attn.out_proj.weight"] = matrix(hidden, values)
        if i in c.get("mlp_only_layers", ()):
            out |= swiglu(f"{at}mlp", c["intermediate_size"])
            continue
        out[f"{at}mlp.gate.weight"] = matrix(experts, hidden, gain=2.0)
        out[f"{at}mlp.experts.gate_up_proj"] = matrix(experts, 2 * inner, hidden)
        out[f"{at}mlp.experts.down_proj"] = matrix(experts, hidden, inner)
        if recipe.hybrid:
            out |= swiglu(f"{at}mlp.shared_expert", c["shared_expert_intermediate_size"])
            out[f"{at}mlp.shared_expert_gate.weight"] = matrix(1, hidden)
    out["model.norm.weight"] = norm(hidden)
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = matrix(c["vocab_size"], hidden, gain=3.0)
    return out


def write(recipe: Recipe, folder: Path) -> dict[str, np.ndarray]:
    """Write the checkpoint and return the float32 values it really holds, under the names of ``transformers``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(recipe.config)
    if recipe.form == "mlx":
        stored, held, config["quantization"] = _mlx(recipe)
        config["quantization_config"] = config["quantization"]
    else:
        stored, held = _hugging_face(recipe)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    names = sorted(stored, key=lambda name: hash_order(name, recipe.seed))  # MLX writes in arbitrary order too
    if recipe.shards == 1:
        save_file({name: stored[name] for name in names}, folder / "model.safetensors")
        return held
    files = [f"model-{s + 1:05d}-of-{recipe.shards:05d}.safetensors" for s in range(recipe.shards)]
    weight_map = {name: files[i % recipe.shards] for i, name in enumerate(names)}
    for file in files:
        save_file({name: stored[name] for name in names if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return held


def hash_order(name: str, seed: int) -> int:
    """A fixed arbitrary order of names."""
    return int(np.random.default_rng([seed, *name.encode()]).integers(2**62))


def _hugging_face(recipe: Recipe) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    prefix = "model.language_model." if "text_config" in recipe.config else "model."
    stored, held = {}, {}
    for name, value in tensors(recipe).items():
        exact = name.endswith(("A_log", "linear_attn.norm.weight"))  # float32 in published files
        tensor = torch.from_numpy(value).to(torch.float32 if exact else recipe.dtype)
        held[name] = tensor.float().numpy()
        path = name.replace("model.", prefix, 1) if name.startswith("model.") else name
        if recipe.form == "single" and ".experts." in path:
            base, _, kind = path.rpartition(".")
            for e, expert in enumerate(tensor):
                halves = expert.chunk(2) if kind == "gate_up_proj" else (expert,)
                projections = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                stored |= {f"{base}.{e}.{p}.weight": h.clone() for p, h in zip(projections, halves, strict=True)}
        else:
            stored[path] = tensor
    if "text_config" in recipe.config:  # to be skipped by name
        stored["model.visual.patch_embed.proj.weight"] = torch.zeros(4, 3)
        stored["mtp.fc.weight"] = torch.zeros(4, 8)
    return stored, held


def _mlx(recipe: Recipe) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray], dict[str, Any]]:
    """As ``mlx_lm.convert -q`` lays a model out: stacks, 1 + w norms, conv1d [C, W, 1], affine matrices."""
    prefix = "language_model." if recipe.hybrid else ""
    quantization: dict[str, Any] = {"group_size": recipe.group, "bits": 4, "mode": "affine"}
    stored, held = {}, {}

    def affine(path: str, w: np.ndarray) -> np.ndarray:
        bits = next((b for suffix, b in recipe.bits.items() if path.endswith(suffix)), 4)
        if bits != 4:
            quantization[path] = {"group_size": recipe.group, "bits": bits}
        codes, scales, biases, value = quantise(w, bits, recipe.group)
        stored[f"{path}.weight"] = torch.from_numpy(codes.view(np.int32)).view(torch.uint32)
        stored[f"{path}.scales"], stored[f"{path}.biases"] = scales, biases
        return value

    for name, value in tensors(recipe).items():
        base, _, kind = name.rpartition(".")
        if ".experts." in name:
            stack = f"{prefix}{base.removesuffix('.experts')}.switch_mlp"
            if kind == "down_proj":
                held[name] = affine(f"{stack}.down_proj", value)
            else:
                gate, up = np.split(value, 2, axis=1)
                halves = (affine(f"{stack}.gate_proj", gate), affine(f"{stack}.up_proj", up))
                held[name] = np.concatenate(halves, axis=1)
        elif value.ndim == 2:
            held[name] = affine(prefix + base, value)
        else:
            centred = recipe.hybrid and "norm" in name and "linear_attn" not in name
            shift = 1.0 if centred else 0.0
            tensor = torch.from_numpy(value + np.float32(shift))
            tensor = tensor if kind == "A_log" else tensor.to(torch.bfloat16)
            held[name] = tensor.float().numpy() - np.float32(shift)
            stored[prefix + name] = tensor.transpose(1, 2).contiguous() if tensor.ndim == 3 else tensor
    return stored, held, quantization


def quantise(w: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor, np.ndarray]:
    """Affine codes packed little-endian into uint32, bf16 scales and biases, and the values they stand for."""
    rows = w.reshape(*w.shape[:-1], -1, group)
    low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    scales = torch.from_numpy((high - low) / (2**bits - 1)).to(torch.bfloat16)
    biases = torch.from_numpy(low).to(torch.bfloat16)
    s, b = scales.float().numpy(), biases.float().numpy()
    codes = np.clip(np.round((rows - b) / s), 0, 2**bits - 1).astype(np.uint8)
    stream = np.unpackbits(codes.reshape(*w.shape, 1), axis=-1, bitorder="little")[..., :bits]
    packed = np.packbits(stream.reshape(*w.shape[:-1], -1), axis=-1, bitorder="little").view(np.uint32)
    return packed, scales[..., 0], biases[..., 0], (codes * s + b).reshape(w.shape)


def hf_model(recipe: Recipe, held: dict[str, np.ndarray]) -> torch.nn.Module:
    """The model of ``transformers`` in float32, holding the given values."""
    fields = {key: value for key, value in recipe.text.items() if key not in ("model_type", "rope_scaling")}
    if recipe.hybrid:
        kind, config = transformers.Qwen3_5MoeForCausalLM, transformers.Qwen3_5MoeTextConfig(**fields)
    else:
        kind, config = transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**fields)
    config._attn_implementation = "eager"
    model = kind(config).float().eval()
    state = {name: torch.from_numpy(value.copy()) for name, value in held.items()}
    if recipe.text["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


class Trace:
    """Runs a ``transformers`` model and keeps what each layer yields."""

    def __init__(self, recipe: Recipe, held: dict[str, np.ndarray]) -> None:
        self.model = hf_model(recipe, held)
        self.k = recipe.text["num_experts_per_tok"]
        self.hidden: list[np.ndarray] = []
        self.router: list[np.ndarray] = []
        for layer in self.model.model.layers:
            layer.register_forward_hook(lambda _m, _i, out: self.hidden.append(_first(out)[0].numpy().copy()))
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(lambda _m, _i, out: self.router.append(out[0].numpy().copy()))

    @torch.no_grad()
    def run(self, ids: list[int]) -> np.ndarray:
        """Logits [T, V]; fills ``hidden`` (per layer [T, H]) and ``router`` (per MoE layer logits [T, E])."""
        self.hidden.clear()
        self.router.clear()
        return self.model(input_ids=torch.tensor([ids])).logits[0].numpy()

    def greedy(self, ids: list[int], steps: int) -> list[int]:
        """Greedy continuation, recomputed from the start at every step so that no cache is involved."""
        ids = list(ids)
        for _ in range(steps):
            ids.append(int(self.run(ids)[-1].argmax()))
        return ids


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def prompts(recipe: Recipe) -> list[list[int]]:
    """Random prompts of the recipe's lengths."""
    rng = np.random.default_rng([recipe.seed, 1])
    return [rng.integers(0, recipe.text["vocab_size"], n).tolist() for n in recipe.lengths]


def golden(recipe: Recipe, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ``transformers`` computes for each prompt followed by its greedy continuation.

    Per prompt i: ``ids_i`` [T + steps], ``logits_i`` [T + steps, V], ``router_i`` [layers, T + steps, k] (chosen ids).
    Of prompt 0: ``rows`` and ``hidden`` [L, rows, H]. Per model: ``gap`` (smallest distance between the logits of a
    chosen and a rejected expert), ``margin`` (smallest lead of a greedy token), ``hidden_scale`` [L] and
    ``logits_scale`` (largest change per relative change of the embeddings: how rounding errors are amplified), and
    ``logits_rms_scale`` (the root mean square of the same).
    """
    trace, out = Trace(recipe, held), {}
    gap, margin = np.inf, np.inf
    for i, prompt in enumerate(prompts(recipe)):
        ids = trace.greedy(prompt, GREEDY)
        logits = trace.run(ids)
        router = np.stack(trace.router)  # [layers, T, E]
        order = np.argsort(-router, axis=-1, kind="stable")
        ranked = np.take_along_axis(router, order, axis=-1)
        gap = min(gap, (ranked[..., trace.k - 1] - ranked[..., trace.k]).min())
        top = np.sort(logits[len(prompt) - 1 : -1], axis=-1)
        margin = min(margin, (top[:, -1] - top[:, -2]).min())
        out |= {f"ids_{i}": np.array(ids, np.int32), f"logits_{i}": logits.copy()}
        out[f"router_{i}"] = order[..., : trace.k].astype(np.int8)
        if i == 0:
            rows = np.unique([*range(0, len(ids), KEPT_EVERY), len(ids) - 1])
            out |= {"rows": rows, "hidden": np.stack(trace.hidden)[:, rows]}
            out |= _amplification(trace, recipe, ids, logits.copy(), np.stack(trace.hidden))
    return out | {"gap": np.float32(gap), "margin": np.float32(margin)}


def _amplification(
    trace: Trace, recipe: Recipe, ids: list[int], logits: np.ndarray, hidden: np.ndarray
) -> dict[str, np.ndarray]:
    """Change of the outputs per relative change of the embedding table, the largest of a few random directions."""
    table = trace.model.model.embed_tokens.weight.data
    clean = table.clone()
    generator = torch.Generator().manual_seed(recipe.seed)
    hidden_scale, logits_scale, squares = np.zeros(len(hidden)), 0.0, []
    for _ in range(3):
        table.copy_(clean * (1 + NOISE * torch.randn(clean.shape, generator=generator)))
        change = np.abs(trace.run(ids) - logits) / NOISE
        logits_scale = max(logits_scale, change.max())
        squares.append((change**2).mean())
        hidden_scale = np.maximum(hidden_scale, np.abs(np.stack(trace.hidden) - hidden).max(axis=(1, 2)) / NOISE)
    table.copy_(clean)
    scales = {"hidden": hidden_scale, "logits": logits_scale, "logits_rms": np.sqrt(np.mean(squares))}
    return {f"{name}_scale": np.float32(scale) for name, scale in scales.items()}
