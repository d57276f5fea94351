"""Write the model directory: MLX affine 4-bit weights under MLX names, config, generation settings, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from model import Config, Model
from quantise import GROUP, bits_of, encode, pack
from safetensors.torch import save_file

Tensor = torch.Tensor
PREFIX = "language_model.model."
SHARD = 14_000_000  # bytes; small files travel better
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def mlx_tensors(model: Model) -> dict[str, Tensor]:
    """The file's tensors: fused expert stacks split, matrices packed, zero-centred norms stored as 1 + w."""
    out: dict[str, Tensor] = {}

    def put(name: str, w: Tensor, bits: int) -> None:
        codes, scales, biases = encode(w, bits)
        path = PREFIX + name.removesuffix(".weight")
        out[path + ".weight"], out[path + ".scales"], out[path + ".biases"] = pack(codes, bits), scales, biases

    for name, p in model.state_dict().items():
        w = p.detach().float().cpu()
        if name.endswith("experts.gate_up_proj"):
            stem = name.replace("experts.gate_up_proj", "switch_mlp.")
            for part, half in zip(("gate_proj", "up_proj"), w.chunk(2, 1), strict=True):
                put(stem + part, half, 4)
        elif name.endswith("experts.down_proj"):
            put(name.replace("experts.down_proj", "switch_mlp.down_proj"), w, 4)
        elif bits := bits_of(name):
            put(name, w, bits)
        elif name.endswith("A_log"):
            out[PREFIX + name] = w
        elif name.endswith("conv1d.weight"):
            out[PREFIX + name] = w.transpose(1, 2).bfloat16()
        elif name.endswith("norm.weight") and "linear_attn.norm" not in name:
            out[PREFIX + name] = (1 + w).bfloat16()
        else:
            out[PREFIX + name] = w.bfloat16()
    return {k: v.contiguous() for k, v in out.items()}


def config_json(c: Config) -> dict[str, Any]:
    quantisation: dict[str, Any] = {"group_size": GROUP, "bits": 4, "mode": "affine"}
    for i in range(c.num_hidden_layers):
        for part in ("gate", "shared_expert_gate"):
            quantisation[f"{PREFIX}layers.{i}.mlp.{part}"] = {"group_size": GROUP, "bits": 8, "mode": "affine"}
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "tie_word_embeddings": True, "dtype": "bfloat16",
        "eos_token_id": [2, 0], "pad_token_id": 0, "text_config": c.to_hf(), "quantization": quantisation, "quantization_config": quantisation,
    }  # fmt: skip


GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "repetition_penalty": 1.05,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
}


def export(model: Model, tokenizer: Path, out: Path) -> None:
    """Write to a new folder, then swap it in, so that `out` is complete at any time."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD
    for name, tensor in mlx_tensors(model).items():
        size = tensor.numel() * tensor.element_size()
        if size > room:
            shards.append({})
            room = SHARD
        shards[-1][name] = tensor
        room -= size
    where = {}
    for n, shard in enumerate(shards, 1):
        file = f"model-{n:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(shard, fresh / file, metadata={"format": "mlx"})
        where.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for s in shards for t in s.values())
        (fresh / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": where}, separators=(",", ":")) + "\n"
        )
    (fresh / "config.json").write_text(json.dumps(config_json(model.config), indent=1) + "\n")
    (fresh / "generation_config.json").write_text(json.dumps(GENERATION, indent=1) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
