"""``moestream chat``: a plain loop over a conversation kept in memory."""

from __future__ import annotations

from typing import Any

from moestream.cli import options
from moestream.cli.output import Interrupt, note
from moestream.cli.run import load, write_stream
from moestream.errors import MoestreamError


def chat(
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
    prefix_cache: options.PrefixCache = None,
    prefix_disk: options.PrefixDisk = 0,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
) -> None:
    """Talk to a model. /bye or Ctrl-D ends the chat, Ctrl-C ends only the reply."""
    sampling = options.given(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    messages: list[dict[str, Any]] = []
    states = (context, prefill_chunk, stored_plan, prefetch, prefix_cache, prefix_disk)
    with load(model, ram, threads, cache, active_experts, exact, *states) as llm:
        note("/bye or Ctrl-D ends the chat, Ctrl-C ends the reply, /new forgets the conversation.")
        while (text := _ask()) != "/bye":
            if text == "/new":
                messages.clear()
            elif text:
                messages.append({"role": "user", "content": text})
                with Interrupt(llm.cancel) as interrupt:
                    try:
                        stream = llm.stream_chat(messages, **sampling)
                        if interrupt.asked:  # before there was a request to cancel
                            messages.pop()
                            continue
                        reply, last = write_stream(llm, stream)
                    except MoestreamError as error:
                        # A full context, a failed read, a template that refuses: the next message may do.
                        note(f"moestream: {error}")
                        messages.pop()
                        continue
                messages.append({"role": "assistant", "content": last.reply.content if last.reply else reply})
                if last.receipt and last.receipt.decode_tok_s:
                    note(f"[{last.receipt.new_tokens} tokens at {last.receipt.decode_tok_s:.1f} tok/s]")


def _ask() -> str:
    """The next line of the person; ``/bye`` at the end of input or on Ctrl-C."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        note("")
        return "/bye"
