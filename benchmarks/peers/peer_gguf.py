"""A GGUF file of random weights with the geometry of our synthetic checkpoints, written at disk speed.

The tensors are those of ``moestream.checkpoint.geometry``, under GGUF's names and in GGUF's formats: matrices in q4_0
or q4_K (4.5 bits a weight, as our affine 4-bit in groups of 64), routers and vectors in float32, as published files
have them. The vocabulary is made up. Needs ``pip install gguf``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from peer_router import BLOCK, CODE_STD, CODES, PeerRouter

from moestream.checkpoint.geometry import Config, Planned, geometry, plan_tensors

try:
    import gguf
except ImportError as error:
    raise SystemExit(f"writing GGUF files needs one more package: pip install gguf ({error})") from error

U8 = npt.NDArray[np.uint8]

TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_k": gguf.GGMLQuantizationType.Q4_K}
BYTES_OF = {"q4_0": (32, 18), "q4_k": (256, 144)}
"""Weights and bytes of a block."""
CONSTANT = {"q4_0": 1.0, "q4_k": (12 - 7.5) / CODE_STD}
"""What the embedding holds in the constant block."""
POOL_BLOCKS = {"q4_0": 1 << 18, "q4_k": 1 << 16}
ARCHITECTURES = {"qwen3_moe": "qwen3moe", "qwen3_5_moe": "qwen35moe"}
ROOM = 1 << 30

NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",  # qwen35moe: post_attention_norm.weight
    "self_attn.q_proj": "attn_q.weight",
    "self_attn.k_proj": "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.o_proj": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv": "attn_qkv.weight",
    "linear_attn.in_proj_z": "attn_gate.weight",
    "linear_attn.in_proj_b": "ssm_beta.weight",
    "linear_attn.in_proj_a": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj": "ssm_out.weight",
    "mlp.gate": "ffn_gate_inp.weight",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps.weight",
    "mlp.switch_mlp.up_proj": "ffn_up_exps.weight",
    "mlp.switch_mlp.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp.weight",
}
WRITE_HIDDEN = ("attn_output", "ssm_out", "ffn_down_exps", "ffn_down_shexp")
"""Matrices that write to the hidden state; they leave the reserved channels alone."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file; shape as numpy has it, rows last but one."""

    name: str
    shape: tuple[int, ...]
    quantized: bool
    fill: str
    layer: int

    def nbytes(self, kind: str) -> int:
        """Bytes in the file, for matrices of ``kind``."""
        count = int(np.prod(self.shape))
        weights, size = BYTES_OF[kind]
        return count // weights * size if self.quantized else 4 * count


def tensors(config: Config) -> list[Tensor]:
    """The tensors of a config of ``geometry``, under GGUF's names."""
    return [_tensor(module, "text_config" in config) for module in plan_tensors(config)]


def _tensor(module: Planned, hybrid: bool) -> Tensor:
    path = module.path.removeprefix("language_model.")
    fixed = {
        "model.embed_tokens": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head": "output.weight",
    }
    if path in fixed:
        return Tensor(fixed[path], module.shape, module.fill == "matrix", module.fill, -1)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    assert match, path
    name, shape, fill = NAMES[match[2]], module.shape, module.fill
    if hybrid and name == "ffn_norm.weight":
        name = "post_attention_norm.weight"
    if name == "ffn_gate_inp.weight":
        fill = "router"
    elif name == "ffn_gate_inp_shexp.weight":
        fill, shape = "ones", shape[-1:]
    elif fill == "conv":
        shape = shape[:2]
    return Tensor(f"blk.{match[1]}.{name}", shape, fill == "matrix", fill, int(match[1]))


@dataclass(frozen=True, slots=True)
class Work:
    """What one token asks for. The output head is needed once a prompt."""

    dense_bytes: int
    """Matrices used always; of the embedding only one row is."""
    expert_bytes: int
    """k experts of each layer."""
    flops: int
    head_flops: int


def token_work(config: Config, kind: str) -> Work:
    """The work of one decoded token on a file of this kind."""
    text = config.get("text_config", config)
    dense = experts = weights = head = 0
    for tensor in tensors(config):
        count, nbytes = int(np.prod(tensor.shape)), tensor.nbytes(kind)
        if "_exps." in tensor.name:
            experts += nbytes * text["num_experts_per_tok"] // text["num_experts"]
            weights += count * text["num_experts_per_tok"] // text["num_experts"]
        elif tensor.name != "token_embd.weight":
            dense += nbytes
            weights += count * (tensor.quantized or "_inp" in tensor.name)  # vectors are no products
            head += count * (tensor.name == "output.weight")
    return Work(dense, experts, 2 * weights, 2 * head)


def write_gguf(path: Path, name: str, layers: int | None, kind: str, routing: str) -> None:
    """Write a file; it appears complete or not at all.

    Args:
        path: the file to make.
        name: a key of ``moestream.checkpoint.geometry.GEOMETRIES``.
        layers: instead of the published number.
        kind: q4_0 or q4_k.
        routing: a key of ``peer_router.ZIPF``.

    Raises:
        SystemExit: the disk has too little room, or the blocks do not divide the rows.
    """
    config = geometry(name, layers)
    plan = tensors(config)
    if any(tensor.quantized and tensor.shape[-1] % BYTES_OF[kind][0] for tensor in plan):
        raise SystemExit(f"{name} cannot be stored as {kind}: rows must be multiples of {BYTES_OF[kind][0]} weights")
    total = sum(tensor.nbytes(kind) for tensor in plan)
    if shutil.disk_usage(path.parent).free < total + ROOM:
        raise SystemExit(f"{path}: needs {total / 1e9:.1f} GB and 1 GB to spare; free some space or name another --dir")
    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, ARCHITECTURES[config["model_type"]])
    _add_settings(writer, name, config, routing)
    router = peer_router(config, routing)
    for tensor in plan:
        if tensor.quantized:
            *lead, columns = tensor.shape
            weights, size = BYTES_OF[kind]
            shape = (*lead, columns // weights * size)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes(kind), TYPES[kind])
        else:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, tensor in enumerate(plan):
        writer.write_tensor_data(_Pieces(tensor.nbytes(kind), _pieces(number, tensor, kind, router)))  # type: ignore[arg-type]
    writer.close()
    temporary.rename(path)


def set_routing(path: Path, name: str, layers: int | None, kind: str, routing: str) -> None:
    """Exchange the routers of a file written by ``write_gguf``; nothing else depends on the routing."""
    router = peer_router(geometry(name, layers), routing)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        match = re.fullmatch(r"blk\.(\d+)\.ffn_gate_inp\.weight", tensor.name)
        if match:
            tensor.data[:] = router.weights(int(match[1]), CONSTANT[kind])


def peer_router(config: Config, routing: str) -> PeerRouter:
    """The routers that belong to a config."""
    text = config.get("text_config", config)
    return PeerRouter(text["num_experts"], text["num_experts_per_tok"], text["hidden_size"], routing)


class _Pieces:
    """Stands for an array that never lies in memory as a whole: the writer asks only for these two."""

    def __init__(self, nbytes: int, pieces: Iterator[npt.NDArray[Any]]) -> None:
        self.nbytes = nbytes
        self._pieces = pieces

    def tofile(self, file: BinaryIO) -> None:
        """Write all pieces."""
        written = sum(file.write(memoryview(np.ascontiguousarray(piece)).cast("B")) for piece in self._pieces)
        assert written == self.nbytes, (written, self.nbytes)


def _pieces(number: int, tensor: Tensor, kind: str, router: PeerRouter) -> Iterator[npt.NDArray[Any]]:
    random = np.random.default_rng([1, number])
    if tensor.fill == "router":
        yield router.weights(tensor.layer, CONSTANT[kind])
    elif not tensor.quantized:
        yield _vector(tensor, random)
    elif tensor.name == "token_embd.weight":
        for block in _rows(tensor, kind, random, 1.0):
            _set_constant(block, kind, router.reserved)
            yield block
    else:
        writes = any(f".{part}." in tensor.name for part in WRITE_HIDDEN)
        for block in _rows(tensor, kind, random, tensor.shape[-1] ** -0.5):
            yield _zero_first_rows(block, router.reserved) if writes else block


def _rows(tensor: Tensor, kind: str, random: np.random.Generator, deviation: float) -> Iterator[U8]:
    """Matrices of a stack, or runs of rows of a single one: [rows, blocks, bytes of a block], to be changed freely."""
    weights, size = BYTES_OF[kind]
    *_, rows, columns = tensor.shape
    across = columns // weights
    pool = _pool(kind, deviation)
    step = rows if len(tensor.shape) == 3 else max(256, len(pool) // 4 // across)  # the reserved rows are one piece
    for _ in range(tensor.shape[0] if len(tensor.shape) == 3 else 1):
        for done in range(0, rows, step):
            count = min(step, rows - done)
            start = int(random.integers(len(pool) - count * across + 1))
            piece = pool[start : start + count * across].reshape(count, across, size)
            yield piece.copy() if tensor.name == "token_embd.weight" or done == 0 else piece


def _zero_first_rows(block: U8, rows: int) -> U8:
    """Scales of zero, in the piece that starts a matrix; later pieces are read-only and stay."""
    if block.flags.writeable:
        block[:rows] = 0
    return block


@cache
def _pool(kind: str, deviation: float) -> U8:
    """Blocks of random weights of mean 0 and this deviation: [blocks, bytes]; read-only."""
    random = np.random.default_rng([2, *kind.encode()])
    count, (_, size) = POOL_BLOCKS[kind], BYTES_OF[kind]
    pool = np.frombuffer(random.bytes(count * size), np.uint8).reshape(count, size).copy()
    scale = random.uniform(0.75, 1.25, count)
    if kind == "q4_0":  # weight = d (q - 8)
        scale *= random.choice([-1, 1], count) * deviation / (CODE_STD**2 + 0.25) ** 0.5
        pool[:, :2] = scale.astype("<f2")[:, None].view(np.uint8)
    else:  # weight = d s q - dmin m, with s = m (root mean square 44) and dmin = 7.5 d, so that every part is centred
        scale *= deviation / (CODE_STD * 44)
        pool[:, 0:2] = scale.astype("<f2")[:, None].view(np.uint8)
        pool[:, 2:4] = (scale * 7.5).astype("<f2")[:, None].view(np.uint8)
        pool[:, 4:8] |= 0xA0  # bit 5: 32 and more in parts 0 to 3; the upper two bits, 10, do it for 4 to 7
        pool[:, 4:8] &= 0xBF
        pool[:, 8:12] = pool[:, 4:8]
        pool[:, 12:16] = (pool[:, 12:16] & 15) * 17
    pool.flags.writeable = False
    return pool


def _set_constant(rows: U8, kind: str, reserved: int) -> None:
    """Embeddings [rows, blocks, bytes]: the constant in the first 32 channels, unit codes in the others reserved."""
    unit, middle = (np.array([x / CODE_STD], "<f2").view(np.uint8) for x in (1, (CODES - 1) / 2))
    if kind == "q4_0":
        rows[:, : reserved // BLOCK, :2] = unit
        rows[:, 0, :2] = np.array([1 / 7], "<f2").view(np.uint8)
        rows[:, 0, 2:] = 0xFF  # codes of 15: (15 - 8) / 7
    else:  # s = m = 1 in all eight parts of the first block; codes of 12 in the first part
        first = rows[:, 0]
        first[:, 0:2], first[:, 2:4] = unit, middle
        first[:, 4:12], first[:, 12:16] = 0x01, 0x11
        first[:, 16:48] = first[:, 16:48] & 0xF0 | 12


def _vector(tensor: Tensor, random: np.random.Generator) -> npt.NDArray[np.float32]:
    if tensor.fill == "conv":
        return random.standard_normal(tensor.shape, np.float32) * np.float32(0.5)
    if tensor.fill == "log_decay":  # GGUF stores -exp(A_log)
        return -random.uniform(1, 16, tensor.shape).astype(np.float32)
    return np.ones(tensor.shape, np.float32)


def _add_settings(writer: gguf.GGUFWriter, name: str, config: Config, routing: str) -> None:
    """The settings that the two architectures ask for, and a vocabulary of numbers."""
    text = config.get("text_config", config)
    writer.add_name(f"random weights: {json.dumps({'shape': name, 'routing': routing})}")
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text.get("intermediate_size", text["moe_intermediate_size"]))
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_expert_count(text["num_experts"])
    writer.add_expert_used_count(text["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    rope = text.get("rope_parameters", text)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if "rope_parameters" in text:
        writer.add_rope_dimension_count(int(text["head_dim"] * rope["partial_rotary_factor"]))
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
        writer.add_expert_shared_feed_forward_length(text["shared_expert_intermediate_size"])
        writer.add_ssm_conv_kernel(text["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(text["linear_key_head_dim"])
        writer.add_ssm_group_count(text["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(text["linear_num_value_heads"])
        writer.add_ssm_inner_size(text["linear_num_value_heads"] * text["linear_value_head_dim"])
        writer.add_full_attention_interval(text["full_attention_interval"])
    vocab = text["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * vocab)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(vocab - 1)
    writer.add_bos_token_id(vocab - 1)
    writer.add_add_bos_token(False)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
