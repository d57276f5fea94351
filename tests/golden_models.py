"""Golden models for tests: stored checkpoints, what ``transformers`` computes from them, resident experts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest

from moestream.checkpoint.encoding import Extent
from moestream.checkpoint.index import Checkpoint, open_checkpoint
from moestream.errors import ReadError
from moestream.models.batch import Batch
from moestream.models.blocks import ExpertSource
from moestream.models.loader import load_model
from moestream.models.model import Model
from moestream.models.registry import parse_config
from moestream.models.weights import WeightMap, map_weights
from moestream.ops.base import F32, I32, U8, Ops, Wave

FOLDER = Path(__file__).parent / "goldens"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/golden.npz"))
PROMPTS = range(3)
GREEDY = 16
EPS = 2.0**-24
ROUNDINGS = 32
"""Roundings that may pile up, each amplified as a change of the embedding is: about one per operation in a row."""

PEAK = 2.5
"""Largest of 64 normally distributed activations, in units of their spread."""


@dataclass
class Stream:
    """Waves of a source that has everything in memory."""

    waves: list[Wave]
    failures: list[tuple[I32, ReadError]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Wave]:
        return iter(self.waves)


class ResidentExperts:
    """All experts in memory: the twin that streaming is compared with. ``fail`` names experts that cannot be read."""

    def __init__(self, checkpoint: Checkpoint, weights: WeightMap) -> None:
        self.fail: dict[tuple[int, int], ReadError] = {}
        self.layers = {}
        for layer, table in weights.experts.items():
            extents = [Extent(*r) for r in table.ranges.reshape(-1, 3).tolist()]
            sizes = np.array([extent.nbytes for extent in extents])
            offsets = (np.cumsum(sizes) - sizes).reshape(table.ranges.shape[:2])
            self.layers[layer] = (table.layout, np.concatenate(read_extents(checkpoint, extents)), offsets)

    def stream(self, layer: int, ids: I32) -> Stream:
        layout, memory, offsets = self.layers[layer]
        order = np.argsort(ids, axis=None, kind="stable").astype(np.int32)
        experts, counts = np.unique(ids, return_counts=True)
        parts = np.split(order, np.cumsum(counts)[:-1])
        served = [(e, p) for e, p in zip(experts.tolist(), parts, strict=True) if (layer, e) not in self.fail]
        failed = [
            (p, self.fail[layer, e]) for e, p in zip(experts.tolist(), parts, strict=True) if (layer, e) in self.fail
        ]
        chosen = np.array([e for e, _ in served], np.int32)
        starts = np.cumsum([0, *(len(p) for _, p in served)]).astype(np.int32)
        pairs = np.concatenate([np.empty(0, np.int32), *(p for _, p in served)])
        return Stream([Wave(layer, layout, chosen, memory, offsets[chosen], starts, pairs)], failed)

    def at_rest(self) -> nullcontext[None]:
        return nullcontext()


def read_extents(checkpoint: Checkpoint, extents: Sequence[Extent]) -> list[U8]:
    """Byte ranges of a checkpoint, through plain file reads."""
    content = [np.fromfile(path, np.uint8) for path in checkpoint.files]
    return [content[e.file][e.offset : e.offset + e.nbytes] for e in extents]


@dataclass(frozen=True)
class Golden:
    """One stored checkpoint and what ``transformers`` computed; array names are described in ``goldens/tiny.py``."""

    folder: Path
    arrays: dict[str, np.ndarray]

    def ids(self, prompt: int) -> I32:
        """A prompt and its greedy continuation [T]."""
        return self.arrays[f"ids_{prompt}"]

    def logits(self, prompt: int) -> F32:
        """Logits of every row [T, V]."""
        return self.arrays[f"logits_{prompt}"]

    @property
    def logits_bound(self) -> float:
        """How far float32 arithmetic may be from float32 arithmetic done in another order."""
        return float(ROUNDINGS * EPS * self.arrays["logits_scale"])

    @property
    def hidden_bound(self) -> F32:
        """The same for the output of each layer [L]."""
        return ROUNDINGS * EPS * self.arrays["hidden_scale"]

    def rounding_bound(self, layers: int) -> float:
        """Root mean square of what rounding activations to int8 may change the logits by.

        A group's step is its peak / 127, so the error is peak / 127 / sqrt(12) of its spread, independent at each of
        four roundings in a row per layer and amplified like a change of the embedding.
        """
        return float(PEAK / 127 / np.sqrt(12) * np.sqrt(4 * layers) * self.arrays["logits_rms_scale"])

    def fast_bound(self) -> float:
        """Root mean square of what the fast mode may change the logits by: int8 activations if matrices are ``affine``.

        On matrices of plain floats only attention rounds: queries, keys, weights and values of a prompt to bfloat16
        where the CPU multiplies it (else keys and values to float16, which is less), by up to half a unit of 2**-7,
        evenly spread, four times per attention layer and amplified like a change of the embedding.
        """
        layers = parse_config(self.checkpoint.config)[0].layers
        if "mlx4" in self.folder.name:
            return self.rounding_bound(len(layers))
        attention = sum(layer.mixer == "attention" for layer in layers)
        rounding = 2.0**-8 / np.sqrt(3) * np.sqrt(4 * attention) * self.arrays["logits_rms_scale"]
        return self.logits_bound + float(rounding)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    def model(self, ops: Ops, experts: ExpertSource | None = None, embed_on_disk: bool = False) -> Model:
        """Load the checkpoint, by default with resident experts."""
        config, names = parse_config(self.checkpoint.config)
        weights = map_weights(self.checkpoint, config, names)
        source = ResidentExperts(self.checkpoint, weights) if experts is None else experts
        return load_model(
            self.checkpoint,
            config,
            weights,
            ops,
            source,
            lambda extents: read_extents(self.checkpoint, extents),
            embed_on_disk=embed_on_disk,
        )


def make_cpu_ops(exact: bool) -> Ops:
    """The native backend, or a skip that says why there is none."""
    if importlib.util.find_spec("moestream._native") is None:
        pytest.skip("moestream._native is not built: no C++ compiler was found at installation")
    from moestream.ops.cpu import CpuOps

    return CpuOps(exact=exact)


@cache
def golden(name: str) -> Golden:
    """Load a golden once."""
    with np.load(FOLDER / name / "golden.npz") as arrays:
        return Golden(FOLDER / name, dict(arrays))


def run_chunked(model: Model, ids: I32, chunks: Sequence[int]) -> F32:
    """Logits of every row [T, V], feeding the sequence in pieces of the given lengths."""
    assert sum(chunks) == len(ids)
    states, out = model.new_states(), []
    for piece in np.split(ids, np.cumsum(chunks)[:-1]):
        out.append(model.forward(Batch.of([(piece, states)], all_logits=True)))
    return np.concatenate(out)


def assert_close(actual: F32, expected: F32, bound: float, what: str) -> None:
    """Largest difference within a bound; says where it is not. NaN fails."""
    assert actual.shape == expected.shape, what
    error = np.abs(actual - expected)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    assert error[worst] <= bound, f"{what}: off by {error[worst]:.3g} at {worst}, bound {bound:.3g}"
