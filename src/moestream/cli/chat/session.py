"""A conversation with a loaded model: ask, answer, call tools, keep what was said."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moestream.cli.chat.conversation import Chats, Conversation, Message
from moestream.cli.chat.screen import Meter, Screen, View
from moestream.cli.chat.tools import Tool
from moestream.cli.output import Interrupt
from moestream.engine.receipt import FinishReason, Receipt
from moestream.engine.sampling import SamplingParams
from moestream.errors import CheckpointError, MoestreamError, RequestError, TemplateError
from moestream.llm import LLM
from moestream.text.reply_reader import THINK, ReplyReader
from moestream.text.tool_formats import ToolFormat, format_of
from moestream.text.tools import ParsedReply, ToolCall, parse_reply

MAX_ROUNDS = 10
"""Times in a row that the model may call functions before the person is asked again."""
PARAMETERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "stop",
)
"""Of sampling, that can be set."""
SWITCH = "enable_thinking"
"""Variable of chat templates that turns thinking on and off."""


@dataclass(slots=True)
class Answer:
    """What one request brought."""

    reply: ParsedReply
    finish_reason: FinishReason
    receipt: Receipt | None
    lost_call: bool = False
    """A call was begun whose arguments cannot be read."""

    @property
    def empty(self) -> bool:
        """Whether nothing was said."""
        return not self.reply.content.strip() and not self.reply.tool_calls


class Consent:
    """Decides whether a call may run. This one refuses all, as when nobody is there to be asked."""

    def __call__(self, call: ToolCall) -> bool:
        """Whether to run a call.

        Raises:
            KeyboardInterrupt: the person wants to end the turn.
        """
        return False


@dataclass(slots=True)
class Session:
    """A model, what was said to it, and what the person set."""

    llm: LLM
    model: str
    conversation: Conversation
    chats: Chats
    screen: Screen
    tools: Mapping[str, Tool] = field(default_factory=dict)
    consent: Consent = field(default_factory=Consent)
    told: str = "normal"
    """What is said after a reply: ``quiet``, ``normal`` or ``verbose``."""
    receipt: Receipt | None = None
    thought: str = ""
    """Of the last reply."""
    draft: str = ""
    """What the next prompt begins with: a message that got no answer, or one to be changed."""
    edited: int | None = None
    """The message that the next one replaces, with all after it."""
    form: ToolFormat | None = None
    retries: int = 0
    """How often the last message was answered again; a fixed seed would otherwise say the same."""

    def __post_init__(self) -> None:
        """Refuse models that cannot chat.

        Raises:
            TemplateError: there is no chat template, or it has no way to call functions.
            CheckpointError: there is no tokenizer.
        """
        if self.llm.template is None:
            raise TemplateError("the model has no chat template (it is a base model): use moestream run")
        if self.llm.tokenizer is None:
            raise CheckpointError(f"{self.llm.runtime.folder} has no tokenizer.json, which a chat needs")
        self.form = format_of(self.llm.template.source) if self.tools else None
        if self.tools and self.form is None:
            raise TemplateError("--tools: how this model writes calls is not known")

    @property
    def can_switch_thinking(self) -> bool:
        """Whether the chat template knows how to turn thinking on and off."""
        return self.llm.template is not None and SWITCH in self.llm.template.source

    def params(self, changed: Mapping[str, Any] | None = None) -> SamplingParams:
        """How replies are sampled, with other changes than the conversation's.

        Raises:
            RequestError: a value is out of range, or a name is unknown.
        """
        changes = self.conversation.parameters if changed is None else changed
        if unknown := sorted(set(changes) - set(PARAMETERS)):
            raise RequestError(f"unknown sampling parameter {unknown[0]}; known: {', '.join(PARAMETERS)}")
        params = dataclasses.replace(self.llm.default_params, **({"max_tokens": None} | dict(changes)))
        return params if params.seed is None else dataclasses.replace(params, seed=params.seed + self.retries)

    def adopt(self, conversation: Conversation, name: str) -> None:
        """Go on with a conversation that was kept."""
        other = conversation.model not in ("", self.model)
        begun = f" with {conversation.model}" if other else ""
        self.screen.say(f"[{name}: {len(conversation.messages)} messages{begun}, “{conversation.title}”]")
        self.conversation = conversation.model_copy(update={"model": self.model})
        self.receipt, self.thought = None, ""

    def ask(self, text: str) -> None:
        """Send a message; what it leads to is on the screen and in the conversation."""
        messages = self.conversation.messages
        before = list(messages)
        if self.edited is not None:
            del messages[self.edited :]
        self.edited, self.retries = None, 0
        text = text.encode(errors="replace").decode()  # a lone surrogate fits neither a tokenizer nor a file
        messages.append(Message(role="user", content=text))
        if not self._answer():
            messages[:] = before
            self.draft = text

    def again(self) -> bool:
        """Answer the last message once more; False when there is none."""
        messages = self.conversation.messages
        last = self.conversation.last_question()
        if last is None:
            return False
        before = list(messages)
        del messages[last + 1 :]
        self.retries += 1
        if not self._answer():
            messages[:] = before
        return True

    def _answer(self) -> bool:
        """Let the model speak until it is the person's turn; False when nothing came of it."""
        said = False
        for _ in range(MAX_ROUNDS):
            try:
                answer = self._reply()
            except MoestreamError as error:
                # A full context, a failed read, a template that refuses: the next message may do.
                self.screen.warn(str(error))
                return False
            if answer is None or (answer.empty and answer.finish_reason == "cancelled"):
                self.screen.say("[stopped before anything was said]")
                return said
            said = True
            self._add(answer)
            more = bool(answer.reply.tool_calls) and answer.finish_reason != "cancelled"
            more = more and self._call_all(answer.reply.tool_calls)
            self.keep()
            if not more:
                return True
        self.screen.say(f"[stopped after {MAX_ROUNDS} rounds of calls; write something to go on]")
        return True

    def keep(self) -> None:
        """Write the conversation down."""
        try:
            self.chats.keep(self.conversation)
        except OSError as error:
            self.screen.warn(f"the conversation is not kept: {error}")
            self.chats.private = True  # said once

    def _reply(self) -> Answer | None:
        """One request; None when it was cancelled before it began."""
        llm, screen = self.llm, self.screen
        assert llm.tokenizer is not None
        schemas = [tool.schema for tool in self.tools.values()]
        think = self.conversation.think
        variables = {} if think is None else {SWITCH: think}
        with Interrupt(llm.cancel) as interrupt:
            text = llm.render(self.conversation.for_template(), tools=schemas or None, **variables)
            stream = llm.stream(self._fitting(llm.tokenizer.encode(text, special=False)), self.params())
            if interrupt.asked:  # before there was a request to cancel
                return None
            reading = _Reading(ReplyReader(self.form, schemas, text.rstrip().endswith(THINK)), llm)
            with screen.reply() as view:
                llm.on_progress = view.reading
                try:
                    for delta in stream:
                        reading.take(delta.text, len(delta.token_ids), view)
                        reading.finish_reason, reading.receipt = delta.finish_reason or "cancelled", delta.receipt
                except KeyboardInterrupt:  # the second one: the step was not waited for
                    pass
                finally:
                    llm.on_progress = None
                    reading.end(view)
        reply = parse_reply(reading.text, schemas or None, in_thought=text.rstrip().endswith(THINK))
        self.receipt, self.thought = reading.receipt or self.receipt, reply.reasoning or ""
        return Answer(reply, reading.finish_reason, reading.receipt, reading.calls > len(reply.tool_calls))

    def _fitting(self, ids: list[int]) -> list[int]:
        context = self.llm.runtime.engine.context
        if len(ids) >= context:
            raise RequestError(
                f"the conversation has {len(ids)} tokens, but the context holds {context} and a reply must fit, too: "
                "/clear begins anew, a shorter message may do, moestream chat --context N makes room"
            )
        return ids

    def _add(self, answer: Answer) -> None:
        """Put an answer into the conversation and say how it ended."""
        reply, reason = answer.reply, answer.finish_reason
        if reason == "cancelled":  # the calls were not all written
            reply = dataclasses.replace(reply, tool_calls=())
        calls = [{"type": "function", "function": dataclasses.asdict(call)} for call in reply.tool_calls]
        self.conversation.messages.append(
            Message(
                role="assistant",
                content=reply.content,
                reasoning_content=reply.reasoning or None,
                tool_calls=calls or None,
                cut=reason if reason in ("cancelled", "length") else None,
            )
        )
        if reason == "cancelled":
            self.screen.say("[stopped; what was said stays in the conversation]")
        elif reason == "length":
            self.screen.say(f"[cut: {self._limit()}]")
        elif answer.empty:
            self.screen.say("[the model said nothing]")
        if answer.lost_call:
            self.screen.say("[a call was malformed and did not run]")
        if answer.receipt is not None and self.told == "normal":
            self.screen.say(summary(answer.receipt))
        elif answer.receipt is not None and self.told == "verbose":
            self.screen.say("\n".join(answer.receipt.lines()))

    def _limit(self) -> str:
        """Which limit a reply ran into."""
        limit = self.params().max_tokens
        if limit is not None and self.receipt is not None and self.receipt.new_tokens >= limit:
            return f"/set parameter max_tokens is {limit}"
        context = self.llm.runtime.engine.context
        return f"the context of {context} tokens is full; /clear begins anew, --context makes it larger"

    def _call_all(self, calls: tuple[ToolCall, ...]) -> bool:
        """Run the calls that are allowed; False when the person ended the turn."""
        for index, call in enumerate(calls):
            try:
                result = self._call(call)
            except KeyboardInterrupt:
                for left in calls[index:]:
                    self._result(left, "error: the user stopped before this call had ended")
                self.screen.say("[stopped]")
                return False
            self._result(call, result)
        return True

    def _call(self, call: ToolCall) -> str:
        tool = self.tools.get(call.name)
        if tool is None:
            known = ", ".join(self.tools)
            self.screen.say(f"[{call.name} was called, which does not exist]")
            return f"error: there is no function {call.name}; there are: {known}"
        if not self.consent(call):
            self.screen.say(f"[{call.name} was not run]")
            return "error: the user did not allow this call"
        began = time.perf_counter()
        result = tool(call.arguments)
        lines = result.splitlines() or ["(nothing)"]
        more = f" … {len(lines)} lines" if len(lines) > 1 else ""
        first = lines[0] if len(lines[0]) <= 100 else lines[0][:99] + "…"
        self.screen.say(f"[{call.name} took {time.perf_counter() - began:.1f} s: {first}{more}]")
        return result

    def _result(self, call: ToolCall, result: str) -> None:
        result = result.encode(errors="replace").decode()
        self.conversation.messages.append(Message(role="tool", name=call.name, content=result))


class _Reading:
    """A reply as it is read, for the screen."""

    def __init__(self, reader: ReplyReader, llm: LLM) -> None:
        self.text = ""
        self.calls = 0
        self.finish_reason: FinishReason = "cancelled"
        self.receipt: Receipt | None = None
        self._reader = reader
        self._store = llm.runtime.store
        stats = self._store.stats()
        self._meter = Meter(stats, stats)
        self._began = time.perf_counter()
        self._thought_tokens = 0
        self._was_thinking = False

    def take(self, text: str, tokens: int, view: View) -> None:
        """More of the reply."""
        if self._meter.tokens == 0:
            self._began = time.perf_counter()
        self.text += text
        self._meter.add(tokens, self._store.stats())
        thinking = self._reader.thinking
        events = self._reader.push(text)
        self._was_thinking |= self._reader.thinking
        self._thought_tokens += tokens if thinking or self._reader.thinking else 0
        if self._was_thinking and not self._reader.thinking:
            self._fold(view)
        self.calls += sum(type(event).__name__ == "CallStart" for event in events)
        view.show(events, self._meter)

    def end(self, view: View) -> None:
        """The reply has ended, one way or another."""
        events = self._reader.finish()
        if self._was_thinking:
            self._fold(view)
        view.show(events, self._meter)

    def _fold(self, view: View) -> None:
        self._was_thinking = False
        view.thought(time.perf_counter() - self._began, self._thought_tokens)


def summary(receipt: Receipt) -> str:
    """A receipt in a line."""
    facts = [f"{receipt.new_tokens} tokens"]
    if receipt.decode_tok_s:
        facts[0] += f" at {receipt.decode_tok_s:.1f} tok/s"
    if receipt.hit_rate is not None:
        facts.append(f"{100 * receipt.hit_rate:.0f} % hits")
    new = receipt.prompt_tokens - receipt.cached_tokens
    if receipt.ttft_s is not None:
        facts.append(f"prompt {receipt.prompt_tokens} ({new} new) in {receipt.ttft_s:.2f} s")
    return f"[{' · '.join([*receipt.setup.lossy, *facts])}]"
