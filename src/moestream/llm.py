"""The library: load a model, generate, stream, chat, and get logits.

from moestream import LLM

with LLM.load("path/to/model", ram="8GB") as llm:
    print(llm.generate("Tell me a story about a fox", max_tokens=200).text)
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast, overload

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.find import DEMO, find_model
from moestream.config import CacheMode, RunConfig, parse_size
from moestream.engine.engine import Ids
from moestream.engine.load import Progress, Runtime, load_runtime
from moestream.engine.passes import PromptProgress
from moestream.engine.sampling import SamplingParams
from moestream.errors import CheckpointError, RequestError, TemplateError
from moestream.text.chat_template import ChatTemplate
from moestream.text.generation_config import changed, recommended_params
from moestream.text.replies import Completion, Delta, Replies
from moestream.text.tokenizer import Tokenizer
from moestream.text.tools import parse_reply

__all__ = ["LLM", "find_model"]

Prompt = str | Ids
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A loaded model.

    Methods may be called from several threads, and several streams may be read in turn: whoever waits for a token
    runs a step for all, so that requests share the experts they read.

    Attributes:
        tokenizer: None when the folder has no ``tokenizer.json``; token ids still work.
        template: None when the model has no chat template.
        default_params: Sampling as ``generation_config.json`` recommends.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        default_params: SamplingParams | None = None,
    ) -> None:
        self._open: tuple[Runtime, Replies] | None = (runtime, Replies(runtime.engine, tokenizer, runtime.receipt))
        self.tokenizer = tokenizer
        self.template = template
        self.default_params = default_params or SamplingParams()
        _LOADED.add(self)

    @property
    def runtime(self) -> Runtime:
        """Model, engine, plan and store.

        Raises:
            RequestError: the model has been closed.
        """
        return self._opened()[0]

    @property
    def on_progress(self) -> PromptProgress | None:
        """For the wait before a first token: called with (done, total) after each layer of a step that reads prompts.

        ``total`` covers the prompts of that step whole, also the parts of them that earlier and later steps read.
        Called by the thread that runs the step; it must not call the model.
        """
        return self.runtime.engine.on_progress

    @on_progress.setter
    def on_progress(self, report: PromptProgress | None) -> None:
        self.runtime.engine.on_progress = report

    @property
    def _replies(self) -> Replies:
        return self._opened()[1]

    def _opened(self) -> tuple[Runtime, Replies]:
        if self._open is None:
            raise RequestError("the model has been closed")
        return self._open

    @classmethod
    def load(
        cls,
        model: str | Path = DEMO,
        *,
        ram: str | int | None = None,
        threads: int | None = None,
        cache: CacheMode | None = None,
        exact: bool = False,
        active_experts: int | None = None,
        prefill_chunk: int | None = None,
        max_batch: int | None = None,
        max_decode_stall: int | None = None,
        context: int | None = None,
        io_threads: int = 8,
        backend: Literal["auto", "cpu", "reference"] = "auto",
        stored_plan: bool = True,
        prefetch: Literal["auto", "off"] = "auto",
        prefix_cache: str | int | None = 0,
        prefix_disk: str | int = 0,
        progress: Progress | None = None,
    ) -> LLM:
        """Load a model folder; nothing large is allocated before the memory plan fits.

        Args:
            model: A folder, the id of a model that ``hf download`` has fetched, or ``"demo"``.
            ram: Memory of the whole process, ``"8GB"`` or bytes; None: from free memory and the cgroup limit.
            threads: Compute threads; None: from CPU affinity and the cgroup quota.
            cache: ``arena``, ``hybrid``, ``page`` or ``none``; None: the stored plan's, or ``arena``.
            exact: Float32 activations and KV cache.
            active_experts: Experts per token, fewer than the model's own (lossy, named in every receipt).
            prefill_chunk: Prompt tokens of one sweep, at most; None: 512, up to 4,096 where experts are streamed.
            max_batch: Sequences decoded together; None: up to 8, see ``RunConfig``.
            max_decode_stall: Milliseconds that a prompt may keep other replies waiting; None: until its chunk is read.
            context: Tokens a sequence may have; None: min(the model's limit, 8192).
            io_threads: Reads in flight.
            backend: ``auto`` takes the native one, or the numpy reference with a warning.
            stored_plan: Without ``ram`` and ``cache``, follow what ``moestream plan --measure`` has stored.
            prefetch: ``auto``: read experts before their router has chosen them, as long as that is measured to pay.
            prefix_cache: Memory, part of ``ram``, for states of what prompts begin with: the next turn of a chat then
                reads only what is new. 0: none; None: a sixteenth of ``ram``.
            prefix_disk: Bytes of files that keep them between runs. They hold what prompts and replies say.
            progress: Called with (what, bytes done, bytes in all) while loading.

        Raises:
            ConfigError: an argument is wrong.
            CheckpointError: the folder cannot be used.
            BudgetError: the budget cannot hold what must be resident.
            BackendError: the backend asked for is not installed.
        """
        config = RunConfig(
            ram=None if ram is None else parse_size(ram, "ram"),
            threads=threads,
            cache=cache,
            exact=exact,
            active_experts=active_experts,
            prefill_chunk=prefill_chunk,
            max_batch=max_batch,
            max_decode_stall=max_decode_stall,
            context=context,
            io_threads=io_threads,
            backend=backend,
            stored_plan=stored_plan,
            prefetch=prefetch,
            prefix_cache=None if prefix_cache is None else _size(prefix_cache, "prefix_cache"),
            prefix_disk=_size(prefix_disk, "prefix_disk"),
        )
        folder = find_model(model)
        template = ChatTemplate.load(folder)
        if template is not None:
            template.warm()  # its process starts while the weights are read
        try:
            tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
            params = recommended_params(folder)
            runtime = load_runtime(folder, config, tokenizer.eos_ids if tokenizer else frozenset(), progress)
        except BaseException:
            if template is not None:
                template.close()
            raise
        return cls(runtime, tokenizer, template, params)

    def cancel(self) -> None:
        """End every running request before its next step, with the finish reason ``"cancelled"``.

        Safe in a signal handler and from other threads; what was generated so far stays.
        """
        if self._open is not None:
            self._replies.cancel()

    def close(self) -> None:
        """Cancel what runs and give memory, files and processes back. The model cannot be used afterwards."""
        if self._open is not None:
            runtime, replies = self._open
            self._open = None  # the last reference to the weights, unless a stream is still held
            replies.close()
            with replies.lock:  # a step of another thread may still run
                runtime.close()
        if self.template is not None:
            self.template.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the start token if the model wants one.

        Raises:
            CheckpointError: the model has no tokenizer.
        """
        return self._need_tokenizer().encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens.

        Raises:
            CheckpointError: the model has no tokenizer.
        """
        return self._need_tokenizer().decode(ids)

    @overload
    def generate(self, prompt: Prompt, params: SamplingParams | None = None, **changes: Any) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, **changes: Any
    ) -> list[Completion]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **changes: Any
    ) -> Completion | list[Completion]:
        """Complete one prompt, or several as one batch.

        Args:
            prompt: Text or token ids, or a list of either.
            params: How to sample; None: the model's own recommendation.
            changes: Fields of ``SamplingParams`` to change, such as ``max_tokens=100``.

        Returns:
            One completion, or one per prompt in order. In a list a failed request has ``error`` set and the others
            are unharmed.

        Raises:
            RequestError: a prompt or parameter is wrong.
            MoestreamError: the only request failed.
        """
        chosen = self._params(params, changes)
        if _is_single(prompt):
            return self._complete(self._ids(cast(Prompt, prompt)), chosen)
        return self._replies.run([self._ids(p) for p in cast(Sequence[Prompt], prompt)], chosen)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **changes: Any) -> Iterator[Delta]:
        """Complete a prompt, token by token. Closing the iterator cancels the request.

        Raises:
            RequestError: the prompt or a parameter is wrong (at once).
            MoestreamError: the request failed (while iterating).
        """
        return self._replies.stream(self._ids(prompt), self._params(params, changes))

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Messages | None = None,
        template: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}`` objects, as of OpenAI's API.
            params: How to sample; None: the model's own recommendation.
            tools: JSON schemas of functions the model may call.
            template: Variables of the chat template, such as ``{"enable_thinking": False}``.
            changes: Fields of ``SamplingParams`` to change.

        Raises:
            TemplateError: the model has no chat template, or it failed or takes no tools.
            RequestError: messages or a parameter are wrong.
            MoestreamError: the request failed.
        """
        text = self.render(messages, tools=tools, **(template or {}))
        done = self._complete(self._chat_ids(text), self._params(params, changes))
        return dataclasses.replace(done, reply=parse_reply(done.text, tools, in_thought=_in_thought(text)))

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Messages | None = None,
        template: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Iterator[Delta]:
        """Answer a conversation token by token; arguments and errors as in ``chat``."""
        text = self.render(messages, tools=tools, **(template or {}))
        stream = self._replies.stream(self._chat_ids(text), self._params(params, changes))

        def parsed() -> Iterator[Delta]:
            whole: list[str] = []
            for delta in stream:
                whole.append(delta.text)
                if delta.finish_reason is None:
                    yield delta
                else:
                    reply = parse_reply("".join(whole), tools, in_thought=_in_thought(text))
                    yield dataclasses.replace(delta, reply=reply)

        return parsed()

    def render(self, messages: Messages, *, tools: Messages | None = None, **variables: Any) -> str:
        """The text a conversation becomes, up to where the reply begins.

        Raises:
            TemplateError: the model has no chat template, or it failed or takes no tools.
            RequestError: the messages are malformed.
        """
        if self.template is None:
            raise TemplateError("the model has no chat template (it is a base model): use generate() with plain text")
        return self.template.render(messages, tools=tools, **variables)

    def logits(self, ids: Ids) -> npt.NDArray[np.float32]:
        """Logits after every token of one sequence, for evaluation.

        Args:
            ids: T token ids.

        Returns:
            [T, V]; T * V * 4 bytes, outside the memory budget.

        Raises:
            RequestError: the ids are wrong or more than the context.
            ReadError: an expert could not be read.
        """
        with self._replies.lock:
            return self.runtime.engine.logits(ids)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.runtime.folder} has no tokenizer.json: give token ids, or download the model's tokenizer.json"
            )
        return self.tokenizer

    def _ids(self, prompt: Prompt) -> Ids:
        return self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt

    def _chat_ids(self, text: str) -> Ids:
        return self._need_tokenizer().encode(text, special=False)  # the template wrote the special tokens

    def _params(self, params: SamplingParams | None, changes: Mapping[str, Any]) -> SamplingParams:
        chosen = changed(self.default_params if params is None else params, changes)
        if chosen.stop:
            self._need_tokenizer()
        return chosen

    def _complete(self, ids: Ids, params: SamplingParams) -> Completion:
        done = self._replies.run([ids], params)[0]
        if done.error is not None:
            raise done.error
        return done


_LOADED: weakref.WeakSet[LLM] = weakref.WeakSet()


def _close_all() -> None:
    """Wait for what daemon threads compute: one that comes back from native code after Python's end aborts."""
    for llm in list(_LOADED):
        llm.close()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):  # a child has none of the threads it would wait for
    os.register_at_fork(after_in_child=_LOADED.clear)


def _size(value: str | int, name: str) -> int:
    return 0 if value == 0 else parse_size(value, name)


def _is_single(prompt: Prompt | Sequence[Prompt]) -> bool:
    if isinstance(prompt, str | np.ndarray):
        return True
    if not isinstance(prompt, Sequence) or not prompt:
        raise RequestError("the prompt must be text, token ids, or a list of either, and not empty")
    return isinstance(prompt[0], int | np.integer)


def _in_thought(rendered: str) -> bool:
    return rendered.rstrip().endswith("<think>")
