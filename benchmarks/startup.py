"""How long one waits before the first token: the command line, the demo model, and headers of very large checkpoints.

Prints medians and, as the last line, one JSON object. The large checkpoints are true headers over sparse files: nothing
of their hundreds of GB is written, and opening reads headers only. Usage: python benchmarks/startup.py [--repeat N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moestream.checkpoint.geometry import Config, Planned, geometry, plan_tensors
from moestream.checkpoint.index import INDEX_FILE, open_checkpoint
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights

MODEL = "qwen3.5-397b"
SHARD_BYTES = 5_000_000_000
GROUP = 64
Tensor = tuple[str, str, tuple[int, ...], int]
"""Name, dtype, shape, bytes."""


def affine(path: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """An MLX 4-bit module (8-bit routers would differ by a few MB)."""
    *lead, cols = shape
    rows = 1
    for n in lead:
        rows *= n
    yield f"{path}.weight", "U32", (*lead, cols // 8), rows * cols // 2
    for part in ("scales", "biases"):
        yield f"{path}.{part}", "BF16", (*lead, cols // GROUP), rows * cols // GROUP * 2


def plain(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> Tensor:
    """A tensor of floats."""
    count = 4 if dtype == "F32" else 2
    for n in shape:
        count *= n
    return name, dtype, shape, count


def mlx(modules: list[Planned]) -> Iterator[Tensor]:
    """As MLX stores it: experts stacked, 4 bits."""
    for m in modules:
        if m.fill in ("matrix", "router"):
            yield from affine(m.path, m.shape)
        else:
            yield plain(m.path, m.shape)


def single(modules: list[Planned]) -> Iterator[Tensor]:
    """Quantised, one module per expert and projection: 276,480 tensors of experts."""
    for m in modules:
        if ".switch_mlp." in m.path:
            for e in range(m.shape[0]):
                yield from affine(m.path.replace("switch_mlp.", f"experts.{e}."), m.shape[1:])
        else:
            yield from mlx([m])


def fused(modules: list[Planned]) -> Iterator[Tensor]:
    """As Hugging Face publishes it: bf16, gate and up fused, other prefix and axes."""
    for m in modules:
        path = m.path.replace("language_model.model.", "model.language_model.").replace("language_model.lm", "lm")
        if path.endswith("switch_mlp.gate_proj"):
            experts, width, hidden = m.shape
            yield plain(path.replace("switch_mlp.gate_proj", "experts.gate_up_proj"), (experts, 2 * width, hidden))
        elif path.endswith("switch_mlp.down_proj"):
            yield plain(path.replace("switch_mlp", "experts"), m.shape)
        elif m.fill == "conv":
            yield plain(path, (m.shape[0], 1, m.shape[1]))
        elif m.fill in ("matrix", "router"):
            if not path.endswith("switch_mlp.up_proj"):
                yield plain(f"{path}.weight", m.shape)
        else:
            yield plain(path, m.shape)


LAYOUTS = {"MLX stacks, 4 bits": mlx, "Hugging Face fused, bf16": fused, "one module per expert, 4 bits": single}


def write_sparse(folder: Path, config: Config, tensors: Iterator[Tensor]) -> int:
    """Headers, index and config; the files have their true sizes and no content. Returns the bytes they claim."""
    shards: list[list[Tensor]] = [[]]
    size = total = 0
    for tensor in tensors:
        if shards[-1] and size + tensor[3] > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor[3]
        total += tensor[3]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {}
        offset = 0
        for tensor, dtype, shape, nbytes in shard:
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
            weight_map[tensor] = name
        text = json.dumps(header, separators=(",", ":")).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / name, 8 + len(text) + offset)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def open_seconds(folder: Path, repeat: int) -> float:
    """Median time to read, check and map every header."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        checkpoint = open_checkpoint(folder)
        config, names = parse_config(checkpoint.config)
        map_weights(checkpoint, config, names)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def process_seconds(arguments: list[str], repeat: int) -> dict[str, float]:
    """Median time of a whole process, and until it wrote its first byte to stdout."""
    whole, first = [], []
    for _ in range(repeat):
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            first.append(time.perf_counter() - start)
            process.stdout.read()
        whole.append(time.perf_counter() - start)
        if process.returncode:
            raise SystemExit(f"{arguments} ended with {process.returncode}")
    return {"first_byte": statistics.median(first), "whole": statistics.median(whole)}


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    repeat = parser.parse_args().repeat
    run = ["-m", "moestream", "run", "hi", "--max-tokens", "1", "--no-stored-plan"]
    commands = {
        "python -c pass": ["-c", "pass"],
        "import of the command line": ["-c", "import moestream.cli.main"],
        "moestream --help": ["-m", "moestream", "--help"],
        "moestream run, one token of the demo model": run,
    }
    facts: dict[str, Any] = {"processes": {}, "checkpoints": {}}
    for name, arguments in commands.items():
        process_seconds(arguments, 1)  # files into the page cache
        facts["processes"][name] = seconds = process_seconds(arguments, repeat)
        shown = f", first output after {seconds['first_byte']:.3f} s" if "run" in name else ""
        print(f"{name:45} {seconds['whole']:.3f} s{shown}", flush=True)
    config = geometry(MODEL)
    modules = list(plan_tensors(config))
    for name, layout in LAYOUTS.items():
        quantization = {} if layout is fused else {"quantization": {"bits": 4, "group_size": GROUP}}
        with tempfile.TemporaryDirectory() as folder:
            nbytes = write_sparse(Path(folder), config | quantization, layout(modules))
            seconds = open_seconds(Path(folder), repeat)
            inspect = process_seconds(["-m", "moestream", "inspect", folder, "--ram", "64GB"], 3)["whole"]
        facts["checkpoints"][name] = {"bytes": nbytes, "open": seconds, "inspect": inspect}
        print(f"{MODEL}, {name} ({nbytes / 1e9:.0f} GB): opened in {seconds:.2f} s, inspect takes {inspect:.2f} s")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
