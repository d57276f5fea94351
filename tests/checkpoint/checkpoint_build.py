"""Builders the checkpoint tests share: small folders with real encoded weights."""

import json

import numpy as np

from moestream.checkpoint import quant
from moestream.checkpoint.encoding import Encoding
from moestream.checkpoint.safetensors import NewTensor, pread_exact, write_safetensors

SAFETENSORS_NAME = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def raw_safetensors(header, data=b""):
    """Bytes of a file with the given header (a dict, or text or bytes to be taken as they are)."""
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def module(path, w, encoding, plain_suffix=".weight"):
    """Tensors of one module; ``w`` is [..., N, K]."""
    parts = quant.encode(w.reshape(-1, w.shape[-1]), encoding)
    if encoding.kind != "affine":
        return [NewTensor(path + plain_suffix, SAFETENSORS_NAME[encoding.kind], w.shape, parts)]
    lead, k = w.shape[:-1], w.shape[-1]
    dtype = SAFETENSORS_NAME[encoding.scale_dtype]
    return [
        NewTensor(f"{path}.weight", "U32", (*lead, k * encoding.bits // 32), parts[:1]),
        NewTensor(f"{path}.scales", dtype, (*lead, k // encoding.group), parts[1:2]),
        NewTensor(f"{path}.biases", dtype, (*lead, k // encoding.group), parts[2:]),
    ]


def write_folder(path, tensors, config=None, shards=1, align=8):
    """A model folder; with several shards the tensors are dealt out in turn and an index is written."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors, {"format": "mlx"}, align=align)
        return path
    weight_map = {}
    for s in range(shards):
        name = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        mine = tensors[s::shards]
        write_safetensors(path / name, mine, {"format": "mlx"}, align=align)
        weight_map |= {tensor.name: name for tensor in mine}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def read_range(checkpoint, where):
    """Bytes of one [file, offset, nbytes] of an expert table."""
    file, offset, nbytes = where
    return np.frombuffer(pread_exact(checkpoint.files[file], offset, nbytes), np.uint8)


AFFINE4 = Encoding("affine", 4, 64)
BF16 = Encoding("bf16")
