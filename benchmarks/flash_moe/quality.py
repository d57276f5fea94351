"""Claims: 4 of 10 experts lose nothing and 3 collapse; 2-bit experts break JSON tool calls.

Takes the trained model inside the package (12 layers, 6 of 40 experts, 4 bits) with fewer experts or with its experts
requantised, and measures against the model as shipped:

* loss per token on right replies to new tool requests, and on stories that the shipped model sampled itself;
* KL divergence (shipped || changed) per token on the same texts;
* greedy replies to the tool requests: calls that are valid JSON, and replies that are exactly right;
* one story of each.

``--exact`` computes in float32; otherwise as everyone runs it, with int8 activations.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
import texts
from requantise import write_requantised

from moestream import LLM
from moestream.checkpoint.find import DEMO, find_model
from moestream.ops.base import F32

RAM = "1GB"
KINDS = ("known tools", "unseen tools")


def log_softmax(logits: F32) -> F32:
    """Log probabilities [T, V]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def judged(logits: F32, start: int) -> F32:
    """Rows whose prediction is a judged token: those before ids[start:]."""
    return log_softmax(logits[start - 1 : -1])


def losses(llm: LLM, sample: list[texts.Text], shipped: list[F32]) -> tuple[float, float]:
    """Loss and KL(shipped || changed) per judged token; ``shipped`` are that model's ``judged`` of each text."""
    loss = kl = count = 0.0
    for text, p in zip(sample, shipped, strict=True):
        q = judged(llm.logits(text.ids), text.start)  # [T, V]
        targets = text.ids[text.start :]
        loss -= float(q[np.arange(len(targets)), targets].sum())
        kl += float((np.exp(p) * (p - q)).sum())
        count += len(targets)
    return loss / count, kl / count


def tool_rates(llm: LLM, requests: list[texts.ToolRequest]) -> dict[str, float]:
    """Of greedy replies: well-formed, exactly right; of requests for a call: those that get none that can be used."""
    valid = right = broken = called = 0
    prompts = [request.prompt for request in requests]
    replies = llm.generate(prompts, max_tokens=160, temperature=0, repetition_penalty=1.0)
    for request, done in zip(requests, replies, strict=True):
        reply = llm.decode(done.token_ids)
        calls = texts.calls_in(reply)
        wanted = bool(request.expected)
        called += wanted
        valid += texts.well_formed(calls)
        broken += wanted and not (texts.well_formed(calls) and calls)
        right += calls == request.expected and bool(calls) == ("<tool_call>" in reply)
    return {"valid": valid / len(requests), "right": right / len(requests), "no_usable_call": broken / max(called, 1)}


@contextmanager
def changed(bits: int | None, active: int | None, exact: bool) -> Iterator[LLM]:
    """The model with its experts at ``bits`` and ``active`` of them used; None: as shipped."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = find_model(DEMO)
        if bits is not None:
            folder = Path(temporary)
            print("  error relative to the weights:", write_requantised(find_model(DEMO), folder, bits))
        with LLM.load(folder, ram=RAM, exact=exact, active_experts=active, max_batch=8) as llm:
            yield llm


def main() -> None:
    """One block a variant, then the JSON line."""
    parser = common.arguments(__doc__, 1)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], help="requantised experts (default 4 3 2)")
    parser.add_argument("--experts", type=int, nargs="*", default=[6, 5, 4, 3, 2, 1], help="active (default 6 to 1)")
    parser.add_argument("--requests", type=int, default=100, help="tool requests (default %(default)s)")
    parser.add_argument("--stories", type=int, default=8, help="stories judged (default %(default)s)")
    parser.add_argument("--exact", action="store_true", help="float32 activations")
    args = parser.parse_args()
    cases: dict[str, tuple[int | None, int | None]] = {f"{k} of 6 experts": (None, k) for k in args.experts}
    cases |= {f"{bits}-bit experts": (bits, None) for bits in args.bits}
    cases |= {f"{bits}-bit, 4 of 6 experts": (bits, 4) for bits in args.bits if bits == 2}
    facts: dict[str, Any] = {}
    with changed(None, None, args.exact) as shipped:
        tools = {kind: texts.tool_requests(shipped, args.requests, kind == "unseen tools") for kind in KINDS}
        story_texts = texts.stories(shipped, args.stories)
        samples = {"stories": story_texts, **{kind: right for kind, (_, right) in tools.items()}}
        reference = {
            kind: [judged(shipped.logits(text.ids), text.start) for text in sample] for kind, sample in samples.items()
        }
        for name, (bits, active) in cases.items():
            with changed(bits, active, args.exact) as llm:
                loss, kl = losses(llm, story_texts, reference["stories"])
                fact: dict[str, Any] = {"stories": {"loss": loss, "kl": kl}}
                print(f"{name}\n  {'stories':13} loss {loss:.3f}, KL {kl:.4f}", flush=True)
                for kind, (requests, right) in tools.items():
                    loss, kl = losses(llm, right, reference[kind])
                    rates = tool_rates(llm, requests)
                    fact[kind] = {"loss": loss, "kl": kl, **rates}
                    percents = ", ".join(f"{key} {100 * rate:.1f} %" for key, rate in rates.items())
                    print(f"  {kind:13} loss {loss:.3f}, KL {kl:.4f}; replies: {percents}", flush=True)
                story = llm.chat(
                    [{"role": "user", "content": "Tell me a story about a fox"}], max_tokens=90, seed=3
                ).text.replace("\n", " ")
            print(f"  {story}", flush=True)
            facts[name] = {**fact, "story": story}
    common.report("fewer experts and fewer bits", {"requests": args.requests, "exact": args.exact, "cases": facts})


if __name__ == "__main__":
    main()
