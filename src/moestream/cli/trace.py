"""``moestream trace``: record the routing of a run, and replay caches over it without the model."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestream.cli import options
from moestream.cli.output import INTERRUPTED, Bar, Interrupt, byte_amount, note, percent
from moestream.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from moestream.experts.trace import Outcome, Trace
    from moestream.llm import LLM
    from moestream.text.replies import Completion

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The trace to write.")]
DEFAULT_SLOTS = ("1/16", "1/8", "1/4", "3/8", "1/2", "3/4")

app = typer.Typer(no_args_is_help=True, help="Record the routing of a run, and replay caches over it.")


@app.command()
def record(
    output: Output,
    model: Annotated[str, typer.Argument(help="A model folder, or 'demo' for the model in this package.")] = "demo",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="May be repeated. Default: stdin, one prompt a line.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts answered at the same time.")] = 1,
    ram: options.Ram = None,
    threads: options.Threads = None,
    active_experts: options.ActiveExperts = None,
    exact: options.Exact = False,
    context: options.Context = None,
    prefill_chunk: options.PrefillChunk = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompts as they are, without the chat template.")
    ] = False,
) -> None:
    """Run prompts and write which experts every token used in every layer."""
    prompts = _prompts(prompt)
    _check_output(output)
    sampling = options.given(max_tokens=max_tokens, temperature=temperature, seed=seed)
    from moestream.engine.recording import Recorder  # noqa: PLC0415
    from moestream.llm import LLM  # noqa: PLC0415

    with Bar(byte_amount) as bar:
        bar.update(f"Loading {model}")
        llm = LLM.load(
            model,
            ram=ram,
            threads=threads,
            active_experts=active_experts,
            exact=exact,
            context=context,
            prefill_chunk=prefill_chunk,
            max_batch=batch,
            progress=lambda _what, done, total: bar.update(f"Loading {model}", done, total),
        )
    with llm, Interrupt(llm.cancel) as interrupt, Recorder(llm.runtime) as recorder:
        done = _answer(llm, prompts, raw, sampling)
        trace = recorder.trace()
    failed = [f"prompt {i}: {c.error}" for i, c in enumerate(done, 1) if c.error is not None]
    for line in failed:
        note(f"moestream: {line}")
    trace.save(output)
    note(f"wrote {output}: {_describe(trace)}")
    if interrupt.asked:
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(1)


@app.command()
def synthetic(
    output: Output,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer.")] = 512,
    active: Annotated[int, typer.Option(min=1, help="Experts a token uses.")] = 10,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in all.")] = 2000,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="How many of them are a prompt.")] = 0,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens of one sweep.")] = 512,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="All experts equally popular, the worst case for a cache.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same trace.")] = 0,
) -> None:
    """Make a trace without a model: hit rates as published for trained models of 512 experts."""
    _check_output(output)
    from moestream.experts.trace import synthetic_trace  # noqa: PLC0415

    trace = synthetic_trace(experts, active, layers, tokens, prompt_tokens, prefill_chunk, seed, uniform)
    trace.save(output)
    note(f"wrote {output}: {_describe(trace)}")


@app.command()
def replay(
    files: Annotated[list[Path], typer.Argument(help="Traces.", metavar="FILE...", show_default=False)],
    slots: Annotated[
        list[str] | None,
        typer.Option(
            help="Experts that fit in memory, as a number over all layers, or as a share such as 1/8 or 12.5%. May be "
            f"repeated. Default: {', '.join(DEFAULT_SLOTS)}.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="lru, lfru (what runs), or lfru:64 for a half-life of 64 tokens. May be repeated. "
            "Default: lru and lfru. The best possible, belady, is always added.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw hit rate against slots.")] = True,
    as_json: options.Json = False,
) -> None:
    """Replay cache sizes and policies over traces; the policies are those that run, reads take no time."""
    from moestream.experts.trace import load_trace  # noqa: PLC0415
    from moestream.experts.trace import replay as replay_trace  # noqa: PLC0415

    results = []
    for file in files:
        trace = load_trace(file)
        sizes = [_slots(text, len(trace.layers) * trace.experts) for text in slots or DEFAULT_SLOTS]
        with Bar(percent) as bar:
            outcomes = replay_trace(trace, policy or ["lru", "lfru"], sizes, _shown(bar, file))
        if as_json:
            results.append(_facts(file, trace, outcomes))
            continue
        print(f"{file}: {_describe(trace)}")
        print("\n".join(_table(trace, outcomes)))
        if plot and len(set(sizes)) > 1:
            print(_plot(outcomes))
    if as_json:
        print(json.dumps(results))


def _shown(bar: Bar, file: Path) -> Callable[[int, int], None]:
    return lambda done, total: bar.update(f"Replaying {file.name}", done, total)


def _prompts(given: list[str] | None) -> list[str]:
    """The prompts of the flag, or those of stdin."""
    if given is None:
        if sys.stdin.isatty():
            note("Type prompts, one a line, and end them with Ctrl-D:")
        try:
            given = sys.stdin.read().splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"the prompts on stdin are not text: {error}") from error
    prompts = [text for text in given if text.strip()]
    if not prompts:
        raise ConfigError(
            'there is no prompt; write for example: moestream trace record demo -o fox.safetensors -p "Hi"'
        )
    return prompts


def _check_output(output: Path) -> None:
    """Fail before minutes of work rather than after them."""
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise ConfigError(f"--output: {output} cannot be written; name a file in a folder that exists")


def _answer(llm: LLM, prompts: list[str], raw: bool, sampling: dict[str, Any]) -> list[Completion]:
    """Run the prompts, as chats where the model has a template."""
    if raw or llm.template is None or llm.tokenizer is None:
        return llm.generate(prompts, **sampling)
    texts = [llm.render([{"role": "user", "content": text}]) for text in prompts]
    return llm.generate([llm.tokenizer.encode(text, special=False) for text in texts], **sampling)


def _describe(trace: Trace) -> str:
    k = trace.ids.shape[2]
    return (
        f"{len(trace.tokens)} tokens in {trace.steps} steps of {trace.model}, "
        f"{len(trace.layers)} layers x {trace.experts} experts, {k} per token"
    )


def _slots(text: str, experts: int) -> int:
    """Slots from a number, a fraction or a percentage of all experts."""
    if match := re.fullmatch(r"(\d{1,9})", text):
        count = int(match[1])
    elif match := re.fullmatch(r"(\d{1,4})/(\d{1,4})", text):
        count = experts * int(match[1]) // max(1, int(match[2]))
    elif match := re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", text):
        count = int(experts * float(match[1]) / 100)
    else:
        count = 0
    if count < 1:
        raise ConfigError(f"--slots: {text!r} is no number of slots; write for example 480, 1/8 or 12.5%")
    return min(count, experts)


def _facts(file: Path, trace: Trace, outcomes: list[Outcome]) -> dict[str, Any]:
    """One trace for ``--json``."""
    return {
        "file": str(file),
        "model": trace.model,
        "layers": list(trace.layers),
        "experts": trace.experts,
        "active": trace.ids.shape[2],
        "tokens": len(trace.tokens),
        "steps": trace.steps,
        "outcomes": [
            {
                "policy": o.policy,
                "slots": o.slots,
                "hit_rate": o.hit_rate,
                "reply_hit_rate": o.reply_hit_rate if o.reply_hit_rate == o.reply_hit_rate else None,
                "misses": o.misses,
            }
            for o in outcomes
        ],
    }


def _table(trace: Trace, outcomes: list[Outcome]) -> list[str]:
    """Hit rates, one line per number of slots and one column per policy; in brackets those of reply steps."""
    experts = len(trace.layers) * trace.experts
    names = list(dict.fromkeys(o.policy for o in outcomes))
    by_size = {size: [o for o in outcomes if o.slots == size] for size in dict.fromkeys(o.slots for o in outcomes)}
    lines = [f"{'slots':>8}  {'of all':>6}  " + "  ".join(f"{name:>16}" for name in names)]
    for size, row in by_size.items():
        cells = [f"{100 * o.hit_rate:.1f} % ({100 * o.reply_hit_rate:.1f})" for o in row]
        lines.append(f"{size:>8}  {100 * size / experts:4.0f} %  " + "  ".join(f"{cell:>16}" for cell in cells))
    return [*lines, "hit rates over all steps; in brackets over the steps that only decode"]


def _plot(outcomes: list[Outcome]) -> str:
    """Hit rate against slots for the terminal."""
    from uniplot import plot_to_string  # noqa: PLC0415

    names = list(dict.fromkeys(o.policy for o in outcomes))
    lines = [sorted((o.slots, 100 * o.hit_rate) for o in outcomes if o.policy == name) for name in names]
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return plot_to_string(
        xs=[[x for x, _ in line] for line in lines],
        ys=[[y for _, y in line] for line in lines],
        lines=True,
        color=colored,
        character_set="block" if colored else "ascii",  # a letter for each line where colours cannot tell
        legend_labels=names,
        title="hit rate (%) against slots",
        x_min=0,
        y_min=0,
        y_max=100,
        width=70,
        height=16,
    )
