"""Choose the next token of one request from its logits.

Order of the steps (engines differ in it, so the same parameters need not mean the same distribution elsewhere):

1. penalties: repetition over prompt and reply, then presence and frequency over the reply; the logit bias; then the
   request's constraint forbids what may not come next
2. temperature (0 is greedy: the largest logit, the lower id on a tie; the filters below do not matter then)
3. top-k, 4. top-p of what top-k left, 5. min-p: drop what is less likely than ``min_p`` times the likeliest
6. one uniform number of the request's own generator picks from what is left

Log probabilities are those of the model, before any of this.

Shape letters: V vocabulary, C candidates left after a filter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moestream.errors import NonFiniteLogitsError, RequestError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

MAX_LOGPROBS = 100
HEAD = 1024
"""Candidates sorted at first when only top-p bounds them; a flat distribution needs more."""

BLOCK = 512
"""Weights summed at once to find the block in which a draw falls."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    Raises:
        RequestError: a value is out of range; the message names the field.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities reach ``top_p``."""
    min_p: float = 0.0
    """Drop tokens less likely than ``min_p`` times the likeliest."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens already in the prompt or the reply (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens already in the reply."""
    frequency_penalty: float = 0.0
    """Subtract once per occurrence in the reply."""
    seed: int | None = None
    """A request repeated alone with the same seed gives the same text; None draws fresh randomness.

    Beside other requests the draws stay the same but not always the logits: sums are taken in an order that depends
    on how many rows run together. With ``exact`` that is float32 rounding; otherwise it may flip int8 roundings.
    """
    max_tokens: int | None = 512
    """New tokens at most; None goes on until the context is full."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit); a mapping is accepted. -100 practically forbids a token."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply; they are not part of it. A single string is accepted."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the reply, besides the model's own end tokens."""
    logprobs: int | None = None
    """Report the log probability of each token and of this many likeliest alternatives."""
    ignore_eos: bool = False
    """Go on after the model's own end tokens (for benchmarks)."""
    prompt_logprobs: int | None = None
    """Report the same for each prompt token but the first (for evaluation); its prompt is read in smaller sweeps."""

    def __post_init__(self) -> None:
        """Reject what could only fail later."""
        stop = (self.stop,) if isinstance(self.stop, str) else _sequence("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _sequence("stop_token_ids", self.stop_token_ids))
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        try:
            object.__setattr__(self, "logit_bias", tuple((token, value) for token, value in bias))
        except (TypeError, ValueError):
            raise RequestError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}") from None
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_int("top_k", self.top_k, 0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop must hold non-empty strings, got {text!r}")
        for token, value in self.logit_bias:
            _check_int("logit_bias", token, 0)
            _check_range("logit_bias", value, -100.0, 100.0)
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0)

    @property
    def penalised(self) -> bool:
        """Whether any penalty or bias changes the logits."""
        return (
            bool(self.logit_bias)
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _sequence(name: str, value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise RequestError(f"{name} must be a list, got {value!r}")
    return tuple(value)


def _check_range(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not issubclass(type(value), Real):
        raise RequestError(f"{name} must be a number, got {value!r}")
    if not (value > low if open_low else value >= low) or value > high:  # NaN fails too
        bound = f"{'above' if open_low else 'at least'} {low:g}"
        raise RequestError(f"{name} must be {bound} and at most {high:g}, got {value!r}")


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not issubclass(type(value), Integral):
        raise RequestError(f"{name} must be a whole number, got {value!r}")
    if value < low or (high is not None and value > high):
        raise RequestError(f"{name} must be at least {low}{f' and at most {high}' if high else ''}, got {value}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities of one position, from the model's own distribution."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, logprob) of the likeliest tokens, likeliest first."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token, with log probabilities when the request asked for them."""

    token: int
    logprobs: TokenLogprobs | None


class Constraint(Protocol):
    """What one reply may consist of, such as JSON of a schema. Holds the reply's state, so it serves one request."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow what was accepted: the reply is finished."""

    def mask(self, logits: F32) -> None:
        """Set the logits [V] of tokens that may not come next to -inf, in place; an end token may be left.

        Raises:
            RequestError: nothing may come next.
        """

    def accept(self, token: int) -> None:
        """Go on with a token that ``mask`` left."""


class Sampler:
    """Sampler of one request; holds its generator, so a batch cannot change what it draws."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], constraint: Constraint | None = None) -> None:
        self.params = params
        self.constraint = constraint
        self._prompt = np.unique(np.asarray(prompt, np.int64)) if params.repetition_penalty != 1.0 else None
        self._biased = np.array([token for token, _ in params.logit_bias], np.int64)
        self._bias = np.array([value for _, value in params.logit_bias], np.float32)
        self._random = np.random.default_rng(params.seed)

    def sample(self, logits: F32, reply: Sequence[int]) -> Sampled:
        """Choose a token, one that the constraint allows.

        Args:
            logits: Scores of the next token, [V]; not modified.
            reply: Tokens chosen so far, for the penalties.

        Raises:
            NonFiniteLogitsError: the logits hold NaN or Inf.
            RequestError: the constraint allows nothing.
        """
        if not (math.isfinite(logits.max()) and math.isfinite(logits.min())):  # both propagate NaN
            bad = int(np.count_nonzero(~np.isfinite(logits)))
            raise NonFiniteLogitsError(
                f"{bad} of {logits.size} logits are NaN or Inf after {len(reply)} new tokens; "
                "the checkpoint is damaged or its weights overflow"
            )
        scores = self._penalise(logits, reply) if self.params.penalised else logits
        if self.constraint is not None:
            scores = scores.copy() if scores is logits else scores
            self.constraint.mask(scores)
        token = int(scores.argmax()) if self.params.temperature == 0 else self._draw(scores)
        if self.constraint is not None:
            self.constraint.accept(token)
        top = self.params.logprobs
        return Sampled(token, None if top is None else token_logprobs(logits, token, top))

    def _penalise(self, logits: F32, reply: Sequence[int]) -> F32:
        p = self.params
        scores = logits.copy()
        ids, counts = np.unique(np.asarray(reply, np.int64), return_counts=True)
        if self._prompt is not None:
            seen = np.union1d(self._prompt, ids)
            values = scores[seen]
            scores[seen] = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        scores[ids] -= (p.presence_penalty + p.frequency_penalty * counts).astype(np.float32)
        scores[self._biased] += self._bias
        return scores

    def _draw(self, scores: F32) -> int:
        ids, weights = filtered(scores, self.params)
        pick = drawn(weights, self._random.random())
        return pick if ids is None else int(ids[pick])


def drawn(weights: F32, u: float) -> int:
    """The index at which the running sum of weights [C] passes ``u`` of their total; weights of 0 are never drawn.

    Args:
        weights: Not negative, at least one above 0.
        u: From 0 up to 1.
    """
    whole = weights.size - weights.size % BLOCK
    blocks = weights[:whole].reshape(-1, BLOCK).sum(axis=1, dtype=np.float64)  # a running sum of all takes 2 ms
    sums = np.append(blocks, weights[whole:].sum(dtype=np.float64))
    block, before = _passes(sums, u * float(sums.sum()))
    index, _ = _passes(weights[block * BLOCK : (block + 1) * BLOCK].astype(np.float64), before)
    return block * BLOCK + index


def _passes(weights: npt.NDArray[np.float64], target: float) -> tuple[int, float]:
    """Where the running sum passes a target, and how much of the target is left there."""
    edges = np.cumsum(weights)
    # the target may round up to the total itself; entries of weight 0, which a constraint may forbid, follow it
    last = int(np.searchsorted(edges, edges[-1], side="left"))
    index = min(int(np.searchsorted(edges, target, side="right")), last)
    return index, target - (float(edges[index - 1]) if index else 0.0)


def filtered(scores: F32, params: SamplingParams) -> tuple[I64 | None, F32]:
    """Candidates left by temperature, top-k, top-p and min-p.

    Args:
        scores: Logits after penalties, [V]; -inf is never chosen, something else must be left.
        params: A temperature above 0, and the filters.

    Returns:
        Ids [C], likeliest first (ties: lower id first), or None for all tokens in order of id; and weights
        proportional to their probabilities [C]. Never empty.
    """
    vocab = scores.size
    bounded = 0 < params.top_k < vocab
    if not bounded and params.top_p >= 1.0:
        weights = _weights(scores, params.temperature)
        weights[weights < params.min_p * weights.max()] = 0.0
        return None, weights
    if bounded:
        ids = _largest(scores, params.top_k)
        weights = _weights(scores[ids], params.temperature)
        total = float(weights.sum(dtype=np.float64))
    else:
        every = _weights(scores, params.temperature)
        total = float(every.sum(dtype=np.float64))
        count = min(HEAD, vocab)
        while (weights := every[ids := _largest(scores, count)]).sum(dtype=np.float64) < params.top_p * total:
            if count == vocab:
                break
            count = min(8 * count, vocab)
    if params.top_p < 1.0:
        # the first candidate at which the sum reaches top_p is still kept
        keep = int(np.searchsorted(np.cumsum(weights, dtype=np.float64), params.top_p * total, side="left")) + 1
        ids, weights = ids[:keep], weights[:keep]
    if params.min_p > 0:
        keep = int(np.count_nonzero(weights >= params.min_p * weights[0]))
        ids, weights = ids[:keep], weights[:keep]
    return ids, weights


def _weights(scores: F32, temperature: float) -> F32:
    """exp((scores - max) / temperature), so that the likeliest weighs 1."""
    # the difference is taken first: a tiny temperature then gives exp(-inf) = 0 and not an overflow
    with np.errstate(over="ignore", under="ignore"):
        weights: F32 = np.exp((scores - scores.max()) / np.float32(max(temperature, 1e-6)))
    return weights


def _largest(scores: F32, count: int) -> I64:
    """Ids of the largest scores, in descending order; of equal scores the lower ids come first."""
    if count >= scores.size:
        ids = np.arange(scores.size)
    else:
        bound = np.partition(scores, scores.size - count)[scores.size - count]
        above = np.flatnonzero(scores > bound)
        ids = np.concatenate((above, np.flatnonzero(scores == bound)[: count - len(above)]))
    return ids[np.argsort(-scores[ids], kind="stable")]


def token_logprobs(logits: F32, token: int, top: int) -> TokenLogprobs:
    """Log probabilities of ``token`` and of the ``top`` likeliest tokens under softmax(logits)."""
    high = logits.max()
    norm = float(high) + math.log(float(np.exp(logits - high).sum(dtype=np.float64)))
    best = _largest(logits, min(top, logits.size)) if top else ()
    return TokenLogprobs(token, float(logits[token]) - norm, tuple((int(i), float(logits[i]) - norm) for i in best))
