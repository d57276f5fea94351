"""Which experts to keep: LRU, LFU and LFRU beside the best possible (Belady), over 18 traces and 6 cache sizes.

Ten traces are recorded with the model in the package, the others are simulated. Prints a Markdown table of hit rates in
%, then means, and as the last line one JSON object. Caches start empty; the policies are the code of the expert store,
with the slots it keeps free for reads under way, and Belady uses every slot. About three minutes on two cores.

    python benchmarks/cache_policies.py                       # what docs/performance.md shows
    python benchmarks/cache_policies.py --dir traces --policy lru --policy lfru:64 --only "60 chats"

The prompts quote this repository's documents, so recorded rates move a little as those are edited. LFU is LFRU with a
half-life that no trace reaches.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moestream import LLM
from moestream.checkpoint.routing import SyntheticRouter
from moestream.engine.recording import Recorder
from moestream.experts.trace import Outcome, Trace, load_trace, replay, synthetic_trace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools" / "demo_model"))
import words  # noqa: E402

SHARES = ("1/16", "1/8", "1/4", "3/8", "1/2", "3/4")
LFU = "lfru:10000000"
POLICIES = ("lru", LFU, "lfru")
CONTEXT = 2040
Prompt = tuple[str, bool]
"""A question, and whether tools are offered with it."""


def schema(name: str, description: str, **properties: str) -> dict[str, Any]:
    """A function the model may call."""
    fields = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    schema("get_weather", "Get the weather of a city", city="string"),
    schema("send_email", "Send an email", to="string", subject="string"),
    schema("set_timer", "Set a timer", minutes="integer"),
    schema("convert_money", "Convert money", amount="number", source="string", target="string"),
]


class Prompts:
    """Prompts of several kinds; the same seed gives the same ones."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        names = ("ARCHITECTURE.md", "docs/library.md", "docs/log.md", "README.md", "docs/performance.md")
        self._text = "\n".join((ROOT / name).read_text() for name in names)

    def question(self) -> Prompt:
        """A short question."""
        pick, number = self._random.choice, self._random.randint
        return pick([
            f"What does {pick(words.THINGS)} mean?",
            f"What is the capital of {pick(['France', 'Kenya', 'Japan', 'Peru', 'Egypt', 'Norway'])}?",
            f"Explain {pick(words.TOPICS)} simply.",
            f"How do I {pick(words.EVERYDAY)}?",
            f"What is {number(2, 12)} times {number(2, 12)}?",
            "Hi, how are you?",
            "Who are you?",
        ]), False  # fmt: skip

    def story(self) -> Prompt:
        """A wish for a story."""
        pick = self._random.choice
        return f"Tell me a story about a {pick(words.ANIMALS)} and a {pick(words.THINGS)}.", False

    def tool_call(self) -> Prompt:
        """What one of the tools answers."""
        pick, number = self._random.choice, self._random.randint
        return pick([
            f"What is the weather in {pick(['Paris', 'Oslo', 'Lima', 'Cairo'])}?",
            f"Send an email to {pick(['Anna', 'Ben', 'Chris'])} about the {pick(words.THINGS)}.",
            f"Set a timer for {number(2, 90)} minutes.",
            f"Convert {number(5, 500)} EUR to {pick(['USD', 'GBP', 'JPY'])}.",
        ]), True  # fmt: skip

    def long(self, least: int = 4200, most: int = 4200) -> Prompt:
        """A passage of so many characters to summarise."""
        length = self._random.randint(least, most)
        start = self._random.randrange(len(self._text) - length)
        return "Summarise this text.\n\n" + self._text[start : start + length], False


def record(prompts: Sequence[Prompt], batch: int, tokens: int) -> Trace:
    """The routing of the model in the package while it answers, ``batch`` at a time, at most so many tokens each."""
    with LLM.load("demo", max_batch=batch, context=CONTEXT) as llm, Recorder(llm.runtime) as recorder:
        ids = []
        for text, tools in prompts:
            rendered = llm.render([{"role": "user", "content": text}], tools=TOOLS if tools else None)
            assert llm.tokenizer is not None
            ids.append(llm.tokenizer.encode(rendered, special=False)[: CONTEXT - tokens])
        llm.generate(ids, max_tokens=tokens, seed=1)
        return recorder.trace()


def several(
    sequences: int, prompt: int, reply: int, rounds: int, experts: int = 512, active: int = 10, layers: int = 2
) -> Trace:
    """Simulated sequences that run together, each with a popularity of its own.

    Prompts and replies have 0.3 to 1.5 times the length given; sweeps read up to 512 tokens, and the sequences that
    are past their prompt decode in the same step. Whoever ends is followed by the next, ``rounds`` times.
    """
    chance = np.random.default_rng(0)
    segments: list[tuple[int, int, int, int]] = []
    rows = []
    waiting = [
        (number, int(prompt * chance.uniform(0.3, 1.5)), int(reply * chance.uniform(0.3, 1.5)))
        for number in range(sequences * rounds)
    ]
    running: list[list[Any]] = []  # [number, prompt tokens left, reply tokens left, router]
    step = 0
    while waiting or running:
        while len(running) < sequences and waiting:
            number, in_prompt, in_reply = waiting.pop(0)
            running.append([number, in_prompt, in_reply, SyntheticRouter(experts, active, layers, number)])
        room = 512
        work = [(s, 1, 0) for s in running if s[1] == 0]
        for sequence in running:
            count = min(room, sequence[1])
            if count > 0:
                work.append((sequence, count, 1))
                room -= count
        for sequence, count, in_prompt in work:
            sequence[1 if in_prompt else 2] -= count
            segments.append((step, sequence[0], count, in_prompt))
            rows.append(np.stack([sequence[3].ids(layer, count) for layer in range(layers)], axis=1))
        step += 1
        running = [s for s in running if s[1] > 0 or s[2] > 0]
    ids = np.concatenate(rows).astype(np.uint16)
    tokens = np.full(len(ids), -1, np.int32)
    return Trace("simulated", experts, tuple(range(layers)), ids, tokens, np.array(segments, np.int32))


def traces() -> dict[str, Callable[[], Trace]]:
    """How each trace is made, by its name in the table; every recorded one has prompts of its own seed."""

    def some(seed: int, count: int, *kinds: Callable[[Prompts], Prompt]) -> list[Prompt]:
        prompts = Prompts(seed)
        return [kinds[i % len(kinds)](prompts) for i in range(count)]

    ask, story, tool, long = Prompts.question, Prompts.story, Prompts.tool_call, Prompts.long
    medium: Callable[[Prompts], Prompt] = lambda prompts: prompts.long(1500, 4200)  # noqa: E731
    return {
        "60 chats": lambda: record(some(0, 60, ask), 1, 120),
        "10 stories": lambda: record(some(1, 10, story), 1, 300),
        "25 tool calls": lambda: record(some(2, 25, tool), 1, 100),
        "8 long prompts, up to 150 tokens of reply": lambda: record(some(3, 8, medium), 1, 150),
        "40 chats and stories, 4 at a time": lambda: record(some(4, 40, story, ask), 4, 150),
        "16 stories and long prompts, 4 at a time": lambda: record(some(5, 16, story, medium), 4, 150),
        "64 requests, 8 at a time": lambda: record(some(6, 64, tool, ask, story, ask), 8, 120),
        "8 different prompts, no reply": lambda: record(some(7, 8, long), 1, 1),
        "one prompt 6 times, no reply": lambda: record(some(8, 1, long) * 6, 1, 1),
        "18 chats, stories, long prompts": lambda: record(some(9, 18, ask, story, medium), 1, 150),
        "512 experts, decode": lambda: synthetic_trace(layers=2, tokens=1500),
        "512, prompt of 3,072, then decode": lambda: synthetic_trace(layers=2, tokens=4096, prompt_tokens=3072),
        "128 experts top-8, decode": lambda: synthetic_trace(128, 8, 4, 1500),
        "512, uniform": lambda: synthetic_trace(layers=2, tokens=1000, uniform=True),
        "512, 4 sequences, prompts of 600 to 3,000": lambda: several(4, 2048, 200, 3),
        "512, 4 sequences, prompts of 30 to 150": lambda: several(4, 100, 300, 3),
        "512, 1 sequence, prompts of 450 to 2,250": lambda: several(1, 1500, 250, 5),
        "128 experts, 8 sequences, prompts of 210 to 1,050": lambda: several(8, 700, 150, 2, 128, 8, 4),
    }


def replayed(path: Path, policies: Sequence[str]) -> list[Outcome]:
    """Every policy and Belady at every size."""
    trace = load_trace(path)
    experts = len(trace.layers) * trace.experts
    sizes = [experts * int(a) // int(b) for a, b in (share.split("/") for share in SHARES)]
    return replay(trace, policies, sizes)


def shown(policies: Sequence[str], results: dict[str, list[Outcome]]) -> Iterator[str]:
    """The table, and what it says on average."""
    columns = [*policies, "belady"]
    labels = [{"lfru": "LFRU", "lru": "LRU", LFU: "LFU", "belady": "Belady"}.get(c, c) for c in columns]
    yield f"Hit rates in %: {' / '.join(labels)}, by share of all experts that fit.\n"
    yield "| trace | " + " | ".join(SHARES) + " |"
    yield "|---|" + "---|" * len(SHARES)
    rates = {}  # [policies, shares]
    for name, outcomes in results.items():
        rates[name] = 100 * np.array([o.hit_rate for o in outcomes]).reshape(len(columns), len(SHARES))
        cells = [" / ".join(f"{rate:.0f}" for rate in column) for column in rates[name].T]
        yield f"| {name} | " + " | ".join(cells) + " |"
    everything = np.stack(list(rates.values()))  # [traces, policies, shares]
    replies = 100 * np.array([[o.reply_hit_rate for o in outcomes] for outcomes in results.values()])
    in_reply = np.nanmean(replies.reshape(everything.shape), axis=(0, 2))
    yield ""
    for at, label in enumerate(labels):
        worst = (everything[:, at] - everything[:, 0]).min()
        yield (
            f"{label}: {everything[:, at].mean():.1f} on average, {in_reply[at]:.1f} over steps that only decode; "
            f"at the least {worst:+.1f} points against {labels[0]}"
        )
    facts = {
        "shares": SHARES,
        "policies": columns,
        "rates": {name: table.round(2).tolist() for name, table in rates.items()},
        "mean": everything.mean(axis=(0, 2)).round(2).tolist(),
        "mean_in_replies": in_reply.round(2).tolist(),
    }
    yield json.dumps(facts)


def main() -> None:
    """Record what is missing, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="keep the traces in this folder and use those found there")
    parser.add_argument("--policy", action="append", help="lru, lfru or lfru:HALF-LIFE; may be given several times")
    parser.add_argument("--only", action="append", help="a trace of the table; may be given several times")
    parser.add_argument("--jobs", type=int, default=2, help="replays at once")
    chosen = parser.parse_args()
    makers = traces()
    if unknown := set(chosen.only or ()) - set(makers):
        parser.error(f"--only: no trace is called {', '.join(sorted(unknown))}; there are: {'; '.join(makers)}")
    names = chosen.only or list(makers)
    policies = tuple(chosen.policy or POLICIES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.dir or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{list(makers).index(name):02}.safetensors" for name in names]
        for name, path in zip(names, paths, strict=True):
            if not path.exists():
                print(f"making: {name}", file=sys.stderr, flush=True)
                makers[name]().save(path)
        with ProcessPoolExecutor(chosen.jobs) as pool:
            outcomes = list(pool.map(replayed, paths, [policies] * len(paths)))
    print("\n".join(shown(policies, dict(zip(names, outcomes, strict=True)))))


if __name__ == "__main__":
    main()
