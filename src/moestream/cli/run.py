"""``moestream run``: one prompt, one reply."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moestream.cli import options
from moestream.cli.output import INTERRUPTED, Bar, Interrupt, byte_amount, note, percent
from moestream.config import CacheMode
from moestream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moestream.llm import LLM
    from moestream.text.replies import Delta


def run(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; read from stdin when left out.")] = None,
    model: options.Model = "demo",
    ram: options.Ram = None,
    threads: options.Threads = None,
    cache: options.Cache = None,
    stored_plan: options.StoredPlan = True,
    prefetch: options.Prefetch = "auto",
    active_experts: options.ActiveExperts = None,
    exact: options.Exact = False,
    context: options.Context = None,
    prefill_chunk: options.PrefillChunk = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Answer one prompt: the text to stdout, the receipt to stderr."""
    text = _read_prompt(prompt)
    sampling = options.given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop) if stop else None,
        seed=seed,
    )
    with (
        load(model, ram, threads, cache, active_experts, exact, context, prefill_chunk, stored_plan, prefetch) as llm,
        Interrupt(llm.cancel) as interrupt,
    ):
        if raw or llm.template is None:
            stream = llm.stream(text, **sampling)
        else:
            stream = llm.stream_chat([{"role": "user", "content": text}], **sampling)
        if interrupt.asked:  # before there was a request to cancel
            raise typer.Exit(INTERRUPTED)
        reply, last = write_stream(llm, stream, quiet=as_json)
    receipt = last.receipt
    assert receipt is not None  # the last delta has one
    if as_json:
        print(json.dumps({"text": reply, "finish_reason": last.finish_reason, "receipt": receipt.to_dict()}))
    else:
        note("\n".join(["", *receipt.lines()]))
    if interrupt.asked:
        raise typer.Exit(INTERRUPTED)


def load(
    model: str,
    ram: int | None,
    threads: int | None,
    cache: CacheMode | None,
    active_experts: int | None,
    exact: bool,
    context: int | None,
    prefill_chunk: int | None,
    stored_plan: bool,
    prefetch: Literal["auto", "off"],
    prefix_cache: int | None = 0,
    prefix_disk: int = 0,
) -> LLM:
    """Load a model for one sequence at a time, with a progress bar."""
    from moestream.llm import LLM  # noqa: PLC0415

    with Bar(byte_amount) as bar:
        bar.update(f"Loading {model}")
        llm = LLM.load(
            model,
            ram=ram,
            threads=threads,
            cache=cache,
            active_experts=active_experts,
            exact=exact,
            context=context,
            prefill_chunk=prefill_chunk,
            max_batch=1,
            stored_plan=stored_plan,
            prefetch=prefetch,
            prefix_cache=prefix_cache,
            prefix_disk=prefix_disk,
            progress=lambda _what, done, total: bar.update(f"Loading {model}", done, total),
        )
    setup = llm.runtime.setup
    if setup.measured:
        note(f"Following the plan measured on {setup.measured}: {setup.cache} (not with --no-stored-plan)")
    return llm


def write_stream(llm: LLM, stream: Iterator[Delta], quiet: bool = False) -> tuple[str, Delta]:
    """Print a reply as it comes; returns its text and the last delta."""
    parts: list[str] = []
    for delta in _with_bar(llm, stream):
        parts.append(delta.text)
        if delta.text and not quiet:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    if not quiet:
        print(flush=True)
    return "".join(parts), delta


def _with_bar(llm: LLM, stream: Iterator[Delta]) -> Iterator[Delta]:
    """The deltas; while the first is computed, a bar says how much of the prompt has been read."""
    with Bar(percent) as bar:
        bar.update("Reading the prompt")
        llm.on_progress = lambda done, total: bar.update("Reading the prompt", done, total)
        try:
            first = next(stream)
        finally:
            llm.on_progress = None
    yield first
    yield from stream


def _read_prompt(prompt: str | None) -> str:
    """The argument, or stdin."""
    if prompt is None:
        if sys.stdin.isatty():
            note("Type the prompt and end it with Ctrl-D:")
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ConfigError(f"the prompt on stdin is not text: {error}") from error
    elif os.path.isfile(os.path.join(prompt, "config.json")):  # unlike Path's, not troubled by what no path can be
        raise ConfigError(f"{prompt} is a model folder, not a prompt; write: moestream run PROMPT --model {prompt}")
    if not prompt.strip():
        raise ConfigError('there is no prompt; write for example: moestream run "Tell me a story about a fox"')
    return prompt
