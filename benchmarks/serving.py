"""What many requests at a time cost, through HTTP against ``moestream serve``.

    python benchmarks/serving.py ~/.cache/moestream/bench/qwen3.5-397b-8layers --ram 5GB
    python benchmarks/serving.py MODEL --ram 5GB --parts followup,stall

``moestream bench --synthetic qwen3.5-397b --layers 8`` writes a model larger than the budget. Random weights route
uniformly, so the server's routing is imposed (``serving_routing.py``); everything else is ``moestream serve`` as
installed, in a process of its own, and clients that only count. Prompts are random token ids, so no two share a
beginning unless a part is about that. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx  # comes with the test extra
import numpy as np

READY = re.compile(r"is ready at (http://[^ ]*)/v1")
PROMPT = 64


def child(shared: str, arguments: list[str]) -> None:
    """``moestream serve`` with an imposed routing."""
    from serving_routing import RequestRouter  # noqa: PLC0415

    from moestream.cli.main import main  # noqa: PLC0415
    from moestream.llm import LLM  # noqa: PLC0415

    load = LLM.load.__func__  # type: ignore[attr-defined]

    def routed(cls: type[LLM], *args: Any, **kwargs: Any) -> LLM:
        llm: LLM = load(cls, *args, **kwargs)
        RequestRouter(llm.runtime.model, float(shared))
        return llm

    LLM.load = classmethod(routed)  # type: ignore[method-assign,assignment]
    sys.argv = ["moestream", "serve", *arguments]
    main()


def with_tokenizer(model: Path, folder: Path) -> Path:
    """The model with a tokenizer in which every token is a word, so that every token shows in a stream."""
    for file in model.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    vocab = config.get("text_config", config)["vocab_size"]
    words = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(vocab)}, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(words | {"pre_tokenizer": {"type": "Whitespace"}}))
    return folder


@contextlib.contextmanager
def serving(model: Path, *flags: str, shared: str = "0.5") -> Iterator[str]:
    """A server; its address."""
    command = [sys.executable, __file__, "--child", shared, str(model), "--port", "0", "--name", "model", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if found := READY.search(line):
                    break
            else:
                raise SystemExit("".join(lines))
            threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@dataclass(slots=True)
class Stream:
    """What a client saw of one reply."""

    began: float
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.began

    def gaps(self, start: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between tokens that came in a time."""
        inside = [t for t in self.times if start <= t <= end]
        return [b - a for a, b in itertools.pairwise(inside)]


async def ask(client: httpx.AsyncClient, prompt: list[int], tokens: int, stream: Stream) -> Stream:
    """One streamed completion."""
    body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
    async with client.stream(
        "POST", "/v1/completions", json=body | {"stream_options": {"include_usage": True}}
    ) as reply:
        if reply.status_code != 200:
            raise SystemExit((await reply.aread()).decode())
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line[6:])
            if data.get("usage"):
                stream.cached = data["usage"]["prompt_tokens_details"]["cached_tokens"]
            text = data["choices"][0]["text"] if data.get("choices") else ""
            if words := re.findall(r"w(\d+)", text):
                stream.times += [time.perf_counter()] * len(words)
                stream.ids += map(int, words)
    return stream


def prompt(length: int, seed: int) -> list[int]:
    """Random tokens that every vocabulary has."""
    return np.random.default_rng(seed).integers(100, 16_000, length).tolist()


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """The counters of the server."""
    text = (await client.get("/metrics")).text
    return {m[1]: float(m[2]) for m in re.finditer(r"^(moestream_\S+) (\S+)$", text, re.MULTILINE)}


def spread(values: list[float]) -> dict[str, float]:
    """Median and the 95th of 100."""
    return {"p50": statistics.median(values), "p95": float(np.quantile(values, 0.95))} if values else {}


async def step_end(streams: list[Stream]) -> tuple[float, int]:
    """The next time at which all have got their token of a step, and how many tokens that makes: whole steps count."""

    def tokens() -> int:
        return sum(len(s.times) for s in streams)

    had = tokens()
    while tokens() == had:
        await asyncio.sleep(0.005)
    while tokens() != had:
        had = tokens()
        await asyncio.sleep(0.03)
    return max(s.times[-1] for s in streams), had


async def level(client: httpx.AsyncClient, count: int, seconds: float, seed: int) -> dict[str, Any]:
    """``count`` requests at a time: what they get while all of them decode."""
    streams = [Stream(time.perf_counter()) for _ in range(count)]
    tasks = [
        asyncio.ensure_future(ask(client, prompt(PROMPT, seed * 1000 + i), 2000, s)) for i, s in enumerate(streams)
    ]
    while not all(s.times for s in streams):
        await asyncio.sleep(0.01)
    start, had = await step_end(streams)
    before = await scrape(client)
    await asyncio.sleep(seconds)
    end, have = await step_end(streams)
    after = await scrape(client)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    change = {key: after[key] - before.get(key, 0.0) for key in after}
    read = sum(value for key, value in change.items() if key.startswith("moestream_read_bytes_total"))
    asked = {tier: change[f'moestream_experts_total{{tier="{tier}"}}'] for tier in ("host", "ahead", "disk")}
    new = have - had
    return {
        "requests": count,
        "tokens": new,
        "tok_s": new / (end - start),
        "ttft": spread([s.ttft for s in streams]),
        "gap": spread([gap for s in streams for gap in s.gaps(start, end)]),
        "bytes_per_token": read / new,
        "wasted_per_token": change['moestream_ahead_bytes_total{use="wasted"}'] / new,
        "hit_rate": asked["host"] / max(1.0, sum(asked.values())),
        "read_gb_s": read / (end - start) / 1e9,
    }


async def levels(url: str, counts: list[int], seconds: float) -> list[dict[str, Any]]:
    """All levels, after the cache has settled."""
    rows = []
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=64)) as client:
        await asyncio.gather(*(ask(client, prompt(PROMPT, i), 40, Stream(0.0)) for i in range(4)))
        for count in counts:
            rows.append(await level(client, count, seconds, count))
            row = rows[-1]
            print(
                f"{count:3} requests  {row['tok_s']:6.1f} tok/s  "
                f"first {row['ttft']['p50']:.2f} / {row['ttft']['p95']:.2f} s  "
                f"gap {1000 * row['gap']['p50']:.0f} / {1000 * row['gap']['p95']:.0f} ms  "
                f"{row['bytes_per_token'] / 1e6:.0f} MB/token "
                f"({row['wasted_per_token'] / 1e6:.0f} for nothing)  {100 * row['hit_rate']:.1f} % hits  "
                f"{row['read_gb_s']:.2f} GB/s",
                flush=True,
            )
    return rows


async def followup(url: str, length: int) -> dict[str, Any]:
    """The second turn of a conversation: seconds to its first token."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        first = await ask(client, prompt(length, 5), 16, Stream(time.perf_counter()))
        longer = prompt(length, 5) + first.ids + prompt(30, 6)
        second = await ask(client, longer, 4, Stream(time.perf_counter()))
    return {"first_turn": first.ttft, "second_turn": second.ttft, "cached": second.cached}


async def stall(url: str, length: int, beside: int) -> dict[str, Any]:
    """Replies under way while a long prompt comes in: the waits between their tokens, and the prompt's first token."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        replies = [Stream(time.perf_counter()) for _ in range(beside)]
        tasks = [asyncio.ensure_future(ask(client, prompt(PROMPT, 70 + i), 2000, s)) for i, s in enumerate(replies)]
        while not all(len(s.times) > 30 for s in replies):
            await asyncio.sleep(0.05)
        before = [gap for s in replies for gap in s.gaps()[5:]]
        start = time.perf_counter()
        agent = await ask(client, prompt(length, 9), 1, Stream(start))
        end = agent.times[0]
        await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    during = [gap for s in replies for gap in s.gaps(start - 1.0, end + 1.0)]
    return {
        "prompt": length,
        "ttft": agent.ttft,
        "gap_before": spread(before),
        "gap_during": {**spread(during), "longest": max(during, default=end - start)},
        "tokens_during": sum(start <= t <= end for s in replies for t in s.times),
    }


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", default="5GB")
    parser.add_argument("--parts", default="levels,followup,stall")
    parser.add_argument("--levels", default="1,2,4,8,16")
    parser.add_argument("--seconds", type=float, default=8.0, help="that each level is watched")
    parser.add_argument("--shared", default="1.0,0.5", help="of experts, as popular with one request as with another")
    parser.add_argument("--turn", type=int, default=4096, help="tokens of the first turn")
    parser.add_argument("--long", type=int, default=15_000, help="tokens of the long prompt")
    parser.add_argument("--stalls", default="0,500", help="values of --max-decode-stall")
    parser.add_argument("--flags", default="", help="more flags for moestream serve, in one argument")
    options = parser.parse_args()
    parts, facts = options.parts.split(","), {"model": options.model.name, "ram": options.ram, "flags": options.flags}
    with tempfile.TemporaryDirectory() as made:
        model = with_tokenizer(options.model.resolve(), Path(made))
        usual = ("--ram", options.ram, *options.flags.split())
        if "levels" in parts:
            counts = [int(n) for n in options.levels.split(",")]
            for shared in options.shared.split(","):
                print(f"{shared} of the popular experts are those of all requests", flush=True)
                with serving(model, "--max-batch", str(max(counts)), *usual, shared=shared) as url:
                    facts[f"levels_{shared}"] = asyncio.run(levels(url, counts, options.seconds))
        if "followup" in parts:
            for name, flags in (("with", ()), ("without", ("--prefix-cache", "0"))):
                with serving(model, *flags, *usual) as url:
                    row = facts[f"followup_{name}"] = asyncio.run(followup(url, options.turn))
                print(f"follow-up {name} prefix cache  {row}", flush=True)
        if "stall" in parts:
            for value in options.stalls.split(","):
                flags = ("--max-decode-stall", value, "--context", str(options.long + 1024))
                with serving(model, *flags, *usual) as url:
                    row = facts[f"stall_{value}"] = asyncio.run(stall(url, options.long, 2))
                print(f"--max-decode-stall {value}  {row}", flush=True)
    print(json.dumps(facts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
