"""Traces: the experts that a real run asked for, in a file, and what caches of other sizes and policies make of them.

The file is ordinary safetensors, which has no pickle and no compression, so a trace from a stranger costs no more
memory than its own size. Tensors:

    ids       U8 or U16 [N, L, k]  distinct experts of each row in each layer
    tokens    I32 [N]              token id of each row; -1 where there was none
    segments  I32 [S, 4]           (step, sequence, rows, 1 in a prompt and 0 in a reply), the rows in order

and metadata ``format`` (moestream-trace), ``version`` (1), ``model``, ``experts`` (E) and ``layers`` (a JSON list of
the layers of the model that have experts, L of them).

Shape letters: N rows (tokens in the order they ran), L layers with experts, E experts of a layer, k experts per row,
S segments (consecutive rows of one sequence in one step).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.routing import SyntheticRouter
from moestream.checkpoint.safetensors import Header, NewTensor, pread_exact, read_header, write_safetensors
from moestream.errors import ConfigError, HeaderError, TensorError
from moestream.experts.policy import LFRU, Request, belady_hits, landing_slots, make_policy, serve

FORMAT, VERSION = "moestream-trace", "1"
MAX_EXPERTS = 1 << 16
BELADY = "belady"
_TYPES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32}
Ids = npt.NDArray[np.uint8 | np.uint16]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Trace:
    """The routing of a run.

    Raises:
        TensorError: the arrays do not fit each other; the message names the array.
    """

    model: str
    experts: int
    """E."""
    layers: tuple[int, ...]
    """Layers of the model that have experts."""
    ids: Ids
    """Experts of each row in each layer [N, L, k]."""
    tokens: I32
    """Token id of each row [N]; -1 where there was none."""
    segments: I32
    """(step, sequence, rows, 1 in a prompt and 0 in a reply) [S, 4], in the order of the rows."""

    def __post_init__(self) -> None:
        """Reject what a replay would stumble over."""
        if self.ids.ndim != 3 or self.tokens.ndim != 1 or self.segments.ndim != 2 or self.segments.shape[1] != 4:
            raise TensorError(
                f"a trace holds ids [N, L, k], tokens [N] and segments [S, 4], not "
                f"{self.ids.shape}, {self.tokens.shape} and {self.segments.shape}"
            )
        rows, layers, k = self.ids.shape
        if not 1 <= self.experts <= MAX_EXPERTS or layers != len(self.layers) or not 1 <= k <= self.experts:
            raise TensorError(
                f"ids {self.ids.shape} do not fit {len(self.layers)} layers of {self.experts} experts "
                f"(1 to {MAX_EXPERTS} can be recorded)"
            )
        if len(self.tokens) != rows:
            raise TensorError(f"tokens has {len(self.tokens)} rows, ids has {rows}")
        if rows and self.ids.max() >= self.experts:
            raise TensorError(f"ids names expert {self.ids.max()}, but a layer has {self.experts}")
        ordered = np.sort(self.ids, axis=2)
        if (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
            raise TensorError("ids names an expert twice in one row")
        step, _, length, prompt = self.segments.astype(np.int64).T
        if (length < 1).any() or length.sum() != rows:
            raise TensorError(f"segments cover {length.sum()} rows, ids has {rows}")
        if len(step) and (step[0] != 0 or (np.diff(step) < 0).any() or (np.diff(step) > 1).any()):
            raise TensorError("segments: steps must count up from 0 without gaps")
        if not np.isin(prompt, (0, 1)).all():
            raise TensorError("segments: the last column must be 1 (prompt) or 0 (reply)")

    @property
    def steps(self) -> int:
        """Forward passes."""
        return int(self.segments[-1, 0]) + 1 if len(self.segments) else 0

    @property
    def layer_of_key(self) -> list[int]:
        """The column of ``ids`` that each key belongs to; a key is column * E + expert."""
        return np.repeat(np.arange(len(self.layers)), self.experts).tolist()

    def requests(self) -> list[Request]:
        """What each layer of each step asked for, in order, as the store asks its policy."""
        _, layers, k = self.ids.shape
        step = np.repeat(self.segments[:, 0], self.segments[:, 2]).astype(np.int64)  # [N]
        request = step[:, None] * layers + np.arange(layers)  # [N, L]
        wanted, counts = np.unique(request[:, :, None] * self.experts + self.ids, return_counts=True)
        request, expert = np.divmod(wanted, self.experts)
        starts = np.searchsorted(request, np.arange(self.steps * layers + 1)).tolist()
        numbers = np.array(range(layers * self.experts), object)  # every list shares these
        keys = numbers[request % layers * self.experts + expert].tolist() if layers else []
        tally = counts.tolist()
        sizes = np.bincount(step, minlength=self.steps).tolist()
        once = [1] * k
        return [
            Request(i % layers, keys[a:b], once if sizes[i // layers] == 1 else tally[a:b], sizes[i // layers])
            for i, (a, b) in enumerate(pairwise(starts))
        ]

    def reply_steps(self) -> npt.NDArray[np.bool_]:
        """Which steps held no row of a prompt [steps]."""
        reply = np.ones(self.steps, np.bool_)
        reply[self.segments[self.segments[:, 3] == 1, 0]] = False
        return reply

    def save(self, path: Path) -> None:
        """Write the file; an existing one is replaced at once.

        Raises:
            ConfigError: it cannot be written.
        """
        small = self.experts <= 256
        tensors = [
            NewTensor("ids", "U8" if small else "U16", self.ids.shape, [self.ids.astype(np.uint8 if small else "<u2")]),
            NewTensor("tokens", "I32", self.tokens.shape, [self.tokens.astype("<i4")]),
            NewTensor("segments", "I32", self.segments.shape, [self.segments.astype("<i4")]),
        ]
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "experts": str(self.experts),
            "layers": json.dumps(self.layers),
        }
        try:
            write_safetensors(path, tensors, metadata)
        except OSError as error:
            raise ConfigError(f"{path}: the trace cannot be written: {error}") from error


def load_trace(path: Path) -> Trace:
    """Read a trace; nothing in it is trusted.

    Raises:
        CheckpointError: it is no trace, or a damaged one; the message names the file and the field.
        ReadError: the disk failed.
    """
    header = read_header(path)
    if header.metadata.get("format") != FORMAT:
        raise HeaderError(f"{path}: is not a trace; write one with moestream trace record")
    if header.metadata.get("version") != VERSION:
        raise HeaderError(
            f"{path}: version {header.metadata.get('version', '(none)')[:20]!r} of the trace format is not known "
            f"here, only {VERSION}: record it again, or update moestream"
        )
    layers = _layers(path, header)
    experts = header.metadata.get("experts", "")
    if not (experts.isascii() and experts.isdecimal() and len(experts) <= 9):
        raise HeaderError(f"{path}: metadata field experts must be a number, is {experts[:40]!r}")
    model = "".join(c for c in header.metadata.get("model", "") if c.isprintable())[:200]
    ids = _array(path, header, "ids", ("U8", "U16"))
    tokens, segments = (_array(path, header, name, ("I32",)) for name in ("tokens", "segments"))
    try:
        return Trace(model, int(experts), layers, ids, tokens, segments)
    except TensorError as error:
        raise TensorError(f"{path}: {error}") from error


def _layers(path: Path, header: Header) -> tuple[int, ...]:
    """The metadata field ``layers``."""
    try:
        layers = json.loads(header.metadata.get("layers", ""))
    except (ValueError, RecursionError):
        layers = None
    if not isinstance(layers, list) or not all(type(i) is int and i >= 0 for i in layers):
        raise HeaderError(f"{path}: metadata field layers must be a list of layer numbers")
    return tuple(layers)


def _array(path: Path, header: Header, name: str, types: Sequence[str]) -> npt.NDArray[Any]:
    """One tensor of the file."""
    entry = header.tensors.get(name)
    if entry is None or entry.dtype not in types:
        raise TensorError(f"{path}: tensor {name} must be there as {' or '.join(types)}")
    raw = pread_exact(path, entry.offset, entry.nbytes)
    return np.frombuffer(raw, np.dtype(_TYPES[entry.dtype]).newbyteorder("<")).reshape(entry.shape)


def synthetic_trace(
    experts: int = 512,
    active: int = 10,
    layers: int = 4,
    tokens: int = 2000,
    prompt_tokens: int = 0,
    prefill_chunk: int = 512,
    seed: int = 0,
    uniform: bool = False,
) -> Trace:
    """A trace of ``checkpoint.routing.SyntheticRouter``, calibrated to published hit rates.

    Args:
        experts: E.
        active: k.
        layers: L.
        tokens: N, the first ``prompt_tokens`` of them a prompt.
        prompt_tokens: read in sweeps of ``prefill_chunk``; the others are decoded one by one.
        prefill_chunk: rows of a sweep.
        seed: The same seed gives the same trace.
        uniform: All experts equally popular.

    Raises:
        ConfigError: a number is out of range.
    """
    if not 1 <= active <= experts <= MAX_EXPERTS:
        raise ConfigError(f"active must lie in 1..experts and experts in 1..{MAX_EXPERTS}, got {active} of {experts}")
    if layers < 1 or tokens < 1 or prefill_chunk < 1 or not 0 <= prompt_tokens <= tokens:
        raise ConfigError("layers, tokens and prefill_chunk must be at least 1 and prompt_tokens lie in 0..tokens")
    router = SyntheticRouter(experts, active, layers, seed, uniform)
    ids = np.stack([router.ids(layer, tokens) for layer in range(layers)], axis=1).astype(np.uint16)
    sweeps = [min(prefill_chunk, prompt_tokens - at) for at in range(0, prompt_tokens, prefill_chunk)]
    lengths = sweeps + [1] * (tokens - prompt_tokens)
    segments = [(step, 0, rows, int(step < len(sweeps))) for step, rows in enumerate(lengths)]
    name = f"synthetic {'uniform' if uniform else 'calibrated'}, seed {seed}"
    return Trace(name, experts, tuple(range(layers)), ids, np.full(tokens, -1, np.int32), np.array(segments, np.int32))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy with one number of slots makes of a trace; it starts empty."""

    policy: str
    slots: int
    hit_rate: float
    """Share of the requested experts that were resident, over all steps."""
    reply_hit_rate: float
    """The same over the steps without prompt rows; NaN if there are none."""
    misses: int
    """Experts read."""


def replay(
    trace: Trace,
    policies: Sequence[str],
    slots: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Outcome]:
    """Run policies over a trace as if every read were instantaneous, and the best possible (``belady``) last.

    Args:
        trace: What was asked for.
        policies: Names as of ``policy.make_policy``; ``belady`` is added.
        slots: Experts that fit in memory together, all layers counted.
        progress: Called with (replays done, replays in all).

    Raises:
        ConfigError: a policy is unknown.
    """
    layer_of_key = trace.layer_of_key
    for name in policies:
        make_policy(name, 1, layer_of_key)
    requests = trace.requests()
    asked = np.array([len(request.keys) for request in requests])
    in_reply = np.repeat(trace.reply_steps(), len(trace.layers))
    outcomes: list[Outcome] = []
    total = (len(policies) + 1) * len(slots)
    for name in (*policies, BELADY):
        for size in slots:
            progress(len(outcomes), total)
            if name == BELADY:
                hits = np.array(belady_hits(requests, size))
            else:
                hits = np.array(_hits(make_policy(name, size, layer_of_key), requests))
            outcomes.append(
                Outcome(
                    name,
                    size,
                    float(hits.sum() / asked.sum()) if len(asked) else float("nan"),
                    float(hits[in_reply].sum() / asked[in_reply].sum()) if in_reply.any() else float("nan"),
                    int(asked.sum() - hits.sum()),
                )
            )
    return outcomes


def _hits(policy: LFRU, requests: Sequence[Request]) -> list[int]:
    """Hits of each request, with the slots kept free that the store keeps free in a step of so many rows."""
    free = {rows: landing_slots(policy.capacity, len(policy.slot_of), rows) for rows in {r.rows for r in requests}}
    hits = []
    for request in requests:
        policy.reserve = free[request.rows]
        hits.append(serve(policy, request))
    return hits
