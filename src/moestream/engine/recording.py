"""Records the routing of what an engine runs, as a trace that can be replayed without the model."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np

from moestream.engine.load import Runtime
from moestream.engine.sequence import Sequence
from moestream.experts.trace import MAX_EXPERTS, Ids, Trace
from moestream.ops.base import I32


class Recorder:
    """Notes, while entered, the routing of every step that reaches its last layer.

    with Recorder(llm.runtime) as recorder:
        llm.generate("Once upon a time")
    recorder.trace().save(Path("fox.safetensors"))

    Memory: one or two bytes for each expert of each token and layer, 1.2 KB a token for 60 layers of 10 of 512 experts.
    """

    def __init__(self, runtime: Runtime) -> None:
        """Prepare to record a loaded model."""
        self._runtime = runtime
        self._layers = runtime.config.moe_layers
        self._type = np.uint8 if runtime.config.moe.experts <= 256 else np.uint16
        self._numbers: dict[int, int] = {}  # of sequences: the engine's, and ours, which count from 0
        self._tokens: list[int] = []
        self._segments: list[tuple[int, int, int, int]] = []
        self._ids: list[Ids] = []  # [rows, L, k] of each step
        self._step: list[tuple[Sequence, int, list[int], bool]] = []  # the one under way
        self._routed: list[Ids] = []  # its layers so far

    def __enter__(self) -> Self:
        """Start recording.

        Raises:
            ValueError: the layers have more experts than a trace can name.
        """
        if self._runtime.config.moe.experts > MAX_EXPERTS:
            raise ValueError(f"a trace can name {MAX_EXPERTS} experts of a layer")
        self._runtime.engine.on_step = self._begin
        self._runtime.store.on_route = self._route
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; what was recorded stays."""
        self._runtime.engine.on_step = None
        self._runtime.store.on_route = None

    def trace(self) -> Trace:
        """What was recorded so far."""
        config = self._runtime.config
        none = np.empty((0, len(self._layers), self._runtime.model.active_experts), self._type)
        return Trace(
            model=self._runtime.folder.name,
            experts=config.moe.experts,
            layers=tuple(self._layers),
            ids=np.concatenate([none, *self._ids]),
            tokens=np.array(self._tokens, np.int32),
            segments=np.array(self._segments, np.int32).reshape(-1, 4),
        )

    def _begin(self, chunks: list[tuple[Sequence, int]]) -> None:
        """A step starts; one that did not reach its last layer is forgotten."""
        self._routed = []
        self._step = [(s, count, list(s.upcoming(count)), not s.decoding) for s, count in chunks]

    def _route(self, layer: int, ids: I32) -> None:
        """A layer's router has chosen ids [T, k]."""
        if not self._step:
            return  # logits of a sequence that the scheduler does not know
        self._routed.append(ids.astype(self._type))
        if layer == self._layers[-1]:
            self._end()

    def _end(self) -> None:
        """Keep the step."""
        step = self._segments[-1][0] + 1 if self._segments else 0
        for sequence, count, tokens, in_prompt in self._step:
            number = self._numbers.setdefault(sequence.id, len(self._numbers))
            self._segments.append((step, number, count, int(in_prompt)))
            self._tokens += tokens
        self._ids.append(np.stack(self._routed, axis=1))
        self._step = []
