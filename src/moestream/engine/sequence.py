"""One request on its way through the engine."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from moestream.engine.receipt import FinishReason, Usage
from moestream.engine.sampling import Sampler, SamplingParams, TokenLogprobs
from moestream.errors import MoestreamError
from moestream.models.states import SequenceStates


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is; decides who goes first where not all can."""

    client: str = ""
    """Whoever has fewer requests running goes first."""
    priority: int = 0
    """Lower goes first. Above 0 is work that can wait: one place is always kept from it."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt, reply so far and states of one request. Only the engine changes it."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    sampler: Sampler
    usage: Usage
    limit: int
    """Tokens of prompt and reply it may have at most."""
    caller: Caller = field(default_factory=Caller)
    leader: Sequence | None = None
    """Reads the same prompt or its beginning; while it does, this one waits and then starts from its states."""
    overtaken: int = 0
    """How many later ones have been served before it."""
    reserved: int = 0
    """Bytes of the states' budget that it holds."""
    replay: int = 0
    """Tokens of the reply that are read again, as its states had to make room."""
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
        """Whether everything that is to be read is in the states."""
        return self.left <= 0

    @property
    def scored(self) -> bool:
        """Whether log probabilities of the tokens it reads are wanted."""
        return self.params.prompt_logprobs is not None and not self.replay

    @property
    def left(self) -> int:
        """Tokens still to be read; not positive once it is decoding."""
        return len(self.prompt) + self.replay - self.computed

    def upcoming(self, count: int) -> abc.Sequence[int]:
        """Up to ``count`` next tokens to compute: a piece of what is read, or the latest token of the reply."""
        if self.decoding:
            return self.tokens[-1:]
        if self.computed + count <= len(self.prompt):
            return self.prompt[self.computed : self.computed + count]
        return (*self.prompt, *self.tokens)[self.computed : self.computed + count]
