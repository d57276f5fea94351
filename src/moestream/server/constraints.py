"""Constrained decoding: grammars of JSON and of function calls, enforced by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from moestream.engine.sampling import F32, Constraint
from moestream.server.errors import ApiError
from moestream.server.settings import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH
from moestream.text.reply_reader import END_THINK, THINK
from moestream.text.tokenizer import Tokenizer
from moestream.text.tool_formats import ToolFormat, Tools, json_rule

ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a reply must consist of."""

    schema: Mapping[str, Any] | None = None
    """The text is JSON of this schema."""
    form: ToolFormat | None = None
    """How calls are written."""
    tools: Tools = ()
    """Functions whose calls must be valid."""
    must_call: bool = False
    """The reply is calls and nothing else."""
    parallel: bool = True
    """More than one call is allowed."""

    @property
    def free(self) -> bool:
        """Whether any text will do."""
        return self.schema is None and not self.tools


class Grammars:
    """Makes constraints for one model. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, thinks: bool) -> None:
        """Nothing is prepared before it is needed.

        Args:
            tokenizer: The model's.
            vocab_size: V of the logits.
            thinks: The model may begin a reply with ``<think>``.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._thinks = thinks
        self._lock = threading.Lock()
        self._prepared: LLTokenizer | None = None

    def constraint(self, shape: Shape, in_thought: bool) -> Constraint:
        """A constraint for one reply. Takes about a second the first time, with a large vocabulary.

        Args:
            shape: What the reply must consist of; not ``free``.
            in_thought: The prompt already ended with ``<think>``.

        Raises:
            ApiError: llguidance does not support the schema.
        """
        with self._lock:
            if self._prepared is None:
                eos = sorted(self._tokenizer.eos_ids)
                self._prepared = LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=eos or None)
        grammar = LLMatcher.grammar_from_lark(self.lark(shape, in_thought))
        matcher = LLMatcher(self._prepared, grammar, log_level=0)
        if matcher.is_error():
            raise _unsupported(matcher)
        return MatcherConstraint(matcher)

    def thought_budget(self, inner: Constraint | None, budget: int, in_thought: bool) -> Constraint:
        """A constraint that ends the thinking after ``budget`` tokens.

        Raises:
            ApiError: the model does not think, or not between markers that are tokens.
        """
        end = self._tokenizer.token_id(END_THINK)
        if end is None or not self._thinks:
            raise ApiError(400, "thinking: this model does not think between <think> and </think>", param="thinking")
        return ThoughtBudget(inner, self._tokenizer.token_id(THINK), end, budget, in_thought)

    def lark(self, shape: Shape, in_thought: bool) -> str:
        """The grammar of a reply, in llguidance's dialect of Lark."""
        rules = ["%llguidance {}", r"TEXT: /(.|\n)*/", r"WS: /[ \n]{0,4}/"]
        thought = ""
        if in_thought or self._thinks:
            rules.append(f"thought: {self._until(END_THINK, 'think', rules)} WS")
            thought = "thought " if in_thought else f"({self._literal(THINK)} thought)? "
        bodies = []
        if shape.schema is not None:
            rules.append(f"json: {json_rule(shape.schema)}")
            bodies.append("json")
        if shape.tools:
            assert shape.form is not None
            rules.append(shape.form.grammar(shape.tools, self._literal))
            if shape.must_call or shape.schema is not None:
                bodies.append("call (WS call)*" if shape.parallel else "call")
            else:
                rules.append(f"free_call: {self._call_after_text(shape.form, rules)}")
                bodies.append("free_call* TEXT" if shape.parallel else "(free_call | TEXT)")
        rules.append(f"start: {thought}({' | '.join(bodies)})")
        return "\n".join(rules)

    def _call_after_text(self, form: ToolFormat, rules: list[str]) -> str:
        """Any text, then a call; the text must not hold the call's first marker."""
        if self._is_token(form.opening):
            return "TEXT call"
        raise ApiError(400, "tools: strict and parallel_tool_calls=false need tool_choice required with this model")

    def _until(self, marker: str, name: str, rules: list[str]) -> str:
        """Any text up to and with a marker."""
        if self._is_token(marker):
            return f"TEXT {self._literal(marker)}"
        rules.append(f"until_{name}[suffix={json.dumps(marker)}]: /(.|\\n)*/")
        return f"until_{name}"

    def _is_token(self, text: str) -> bool:
        found = self._tokenizer.token_id(text)
        return found is not None and self._prepared is not None and self._prepared.is_special_token(found)

    def _literal(self, text: str) -> str:
        return text if self._is_token(text) else json.dumps(text)


class MatcherConstraint:
    """A constraint that follows llguidance's parser."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether the grammar is finished."""
        return self._matcher.is_stopped()

    def mask(self, logits: F32) -> None:
        """Forbid tokens that the grammar does not allow."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = bits[: logits.size].astype(bool)
        if self._matcher.is_error() or not allowed.any():
            raise _unsupported(self._matcher)  # too complex a schema shows only now
        logits[: allowed.size][~allowed] = -np.inf
        logits[allowed.size :] = -np.inf

    def accept(self, token: int) -> None:
        """Go on with a token."""
        if not self._matcher.consume_token(token):
            raise _unsupported(self._matcher)


class ThoughtBudget:
    """Ends the thinking of a reply after some tokens; the rest is another constraint's affair."""

    def __init__(self, inner: Constraint | None, begin: int | None, end: int, budget: int, in_thought: bool) -> None:
        self._inner = inner
        self._begin = begin
        self._end = end
        self._left = budget
        self._thinking = in_thought

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return self._inner is not None and self._inner.complete

    def mask(self, logits: F32) -> None:
        """Leave only the end of the thought when the budget is used up."""
        if self._thinking and self._left <= 0:
            end = logits[self._end]
            logits[:] = -np.inf
            logits[self._end] = end
        elif self._inner is not None:
            self._inner.mask(logits)

    def accept(self, token: int) -> None:
        """Count what is thought."""
        if self._inner is not None:
            self._inner.accept(token)
        if self._thinking:
            self._left -= 1
            self._thinking = token != self._end
        elif token == self._begin:
            self._thinking = True


def _unsupported(matcher: LLMatcher) -> ApiError:
    reason = matcher.get_error().split("\n<state>")[0][:300]
    return ApiError(400, f"the schema cannot be enforced: {reason}", code="unsupported_schema")


def check_schema(schema: Any, param: str) -> None:
    """Bound a JSON schema before anything works on it.

    Raises:
        ApiError: it is no object, or too deep or too large.
    """
    if not isinstance(schema, dict):
        raise ApiError(400, f"{param} must be a JSON schema, an object", param=param)
    level: Sequence[Any] = [schema]
    size = depth = 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise ApiError(400, f"{param} is nested more than {MAX_SCHEMA_DEPTH} deep", param=param)
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                size += sum(len(key) for key in value)
                below += value.values()
            elif isinstance(value, list):
                below += value
            else:
                size += len(value) if isinstance(value, str) else 8
        size += len(below)
        level = below
    if size > MAX_SCHEMA_BYTES:
        raise ApiError(400, f"{param} has about {size} bytes, at most {MAX_SCHEMA_BYTES} are allowed", param=param)
