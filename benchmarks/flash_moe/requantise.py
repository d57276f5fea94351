"""Write a copy of a checkpoint whose experts have other bits. All else stays byte for byte.

python benchmarks/flash_moe/requantise.py demo /tmp/demo-2bit --bits 2
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moestream.checkpoint.encoding import Encoding, MatrixLayout
from moestream.checkpoint.find import find_model
from moestream.checkpoint.index import Checkpoint, open_checkpoint
from moestream.checkpoint.quant import decode, encode
from moestream.checkpoint.safetensors import NewTensor, TensorEntry, pread_exact, write_safetensors
from moestream.ops.base import F32, U8

STACK = ".switch_mlp."
PARTS = (".weight", ".scales", ".biases")


def requantise(parts: tuple[U8, ...], rows: int, cols: int, old: Encoding, new: Encoding) -> tuple[tuple[U8, ...], F32]:
    """Encode a matrix again.

    Returns:
        Its new parts, and the error [rows, cols] that the new encoding adds.
    """
    values = decode(MatrixLayout(rows, cols, old), parts)
    again = encode(values, new)
    return again, decode(MatrixLayout(rows, cols, new), again) - values


def _raw(checkpoint: Checkpoint, entry: TensorEntry) -> U8:
    return np.frombuffer(pread_exact(checkpoint.files[entry.file], entry.offset, entry.nbytes), np.uint8)


def write_requantised(source: Path, target: Path, bits: int, group: int = 64) -> dict[str, float]:
    """Copy an MLX-style folder with the experts at ``bits``.

    Returns:
        Per projection the root mean square of the added error over that of the weights.

    Raises:
        SystemExit: the checkpoint has no stacked affine experts.
    """
    checkpoint = open_checkpoint(source)
    stacks = sorted(
        name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight") and STACK in name
    )
    if not stacks or stacks[0] + ".scales" not in checkpoint.tensors:
        raise SystemExit(f"{source} has no experts in MLX's stacked affine form")
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            shutil.copy(file, target)
    new = Encoding("affine", bits, group)
    replaced: dict[str, NewTensor] = {}
    errors: dict[str, list[tuple[float, float]]] = {}
    for stack in stacks:
        entries = [checkpoint.tensors[stack + part] for part in PARTS]
        experts, rows, groups = entries[1].shape
        old_bits = entries[0].shape[2] * 32 // (groups * group)
        parts = tuple(_raw(checkpoint, entry) for entry in entries)
        again, error = requantise(parts, experts * rows, groups * group, Encoding("affine", old_bits, group), new)
        values = decode(MatrixLayout(experts * rows, groups * group, Encoding("affine", old_bits, group)), parts)
        errors.setdefault(stack.rsplit(".", 1)[1], []).append((float((error**2).mean()), float((values**2).mean())))
        shapes = ((experts, rows, groups * group * bits // 32), (experts, rows, groups), (experts, rows, groups))
        for part, entry, shape, raw in zip(PARTS, entries, shapes, again, strict=True):
            replaced[stack + part] = NewTensor(stack + part, entry.dtype, shape, [raw])
    tensors = [
        replaced.get(name) or NewTensor(name, entry.dtype, entry.shape, [_raw(checkpoint, entry)])
        for name, entry in checkpoint.tensors.items()
    ]
    write_safetensors(target / "model.safetensors", tensors, {"format": "mlx"})
    config = with_bits(checkpoint.config, stacks, bits, group)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return {name: (sum(e for e, _ in pairs) / sum(w for _, w in pairs)) ** 0.5 for name, pairs in errors.items()}


def with_bits(config: Mapping[str, Any], stacks: list[str], bits: int, group: int) -> dict[str, Any]:
    """The config with the experts' bits as overrides, under both of the names MLX writes."""
    changed = dict(config)
    for key in ("quantization", "quantization_config"):
        if key in config:
            changed[key] = {**config[key], **{s: {"group_size": group, "bits": bits, "mode": "affine"} for s in stacks}}
    return changed


def main() -> None:
    """Write one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder, or demo")
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int, required=True, choices=(2, 3, 4, 6, 8))
    args = parser.parse_args()
    print(json.dumps({"relative_rms_error": write_requantised(find_model(args.source), args.target, args.bits)}))


if __name__ == "__main__":
    main()
