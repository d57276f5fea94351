"""One request on its way through the engine."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from moestream.engine.receipt import FinishReason, Usage
from moestream.engine.sampling import Sampler, SamplingParams, TokenLogprobs
from moestream.errors import MoestreamError
from moestream.models.states import SequenceStates


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt, reply so far and states of one request. Only the engine changes it."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    sampler: Sampler
    usage: Usage
    states: SequenceStates | None = None
    """None while waiting and after the end."""
    computed: int = 0
    """Tokens of prompt and reply that are in the states."""
    cached: int = 0
    """Tokens of the prompt that the prefix cache had."""
    tokens: list[int] = field(default_factory=list)
    """The reply; an end token, if one ended it, is the last."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's second token and all that follow, where ``params.prompt_logprobs`` asks for them."""
    finish_reason: FinishReason | None = None
    error: MoestreamError | None = None

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt is in the states."""
        return self.computed >= len(self.prompt)

    def upcoming(self, count: int) -> abc.Sequence[int]:
        """Up to ``count`` next tokens to compute: a piece of the prompt, or the latest token of the reply."""
        if self.decoding:
            return self.tokens[-1:]
        return self.prompt[self.computed : self.computed + count]
