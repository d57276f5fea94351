"""What the faster settings change: KL divergence and agreement with the exact mode on the same, teacher-forced tokens.

The text is what the model is made for: tool conversations with the right answers (new requests, made by the generator
of tools/demo_model) and stories that the exact mode wrote once, with sampling. No setting generates: every one reads
the same tokens and its next-token distributions are compared with those of ``--exact``, in nats.

Prints one line per setting and, last, one JSON object. Usage: python benchmarks/fidelity.py [--model FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moestream import LLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "demo_model"))
import tool_calls

F64 = npt.NDArray[np.float64]
STORIES = (
    "Tell me a story about a fox",
    "Tell me a story about a brave little robot.",
    "Write a short story that uses the words bridge, owl and lantern.",
    "Tell me a story about two friends and a lost key.",
    "Explain gravity simply.",
    "How do I make tea?",
)
STORY_TOKENS = 250
SEED = 99


def texts(exact: LLM, tools: int) -> dict[str, list[list[int]]]:
    """Token ids of each kind of text."""
    conversations = [
        exact.render(record["messages"], tools=record.get("tools"))
        for record in tool_calls.records(tools, seed=SEED, unseen=False)
    ]
    stories = []
    for seed, prompt in enumerate(STORIES):
        start = exact.encode(exact.render([{"role": "user", "content": prompt}]))
        stories.append([*start, *exact.generate(start, max_tokens=STORY_TOKENS, temperature=0.7, seed=seed).token_ids])
    return {"tools": [exact.encode(text) for text in conversations], "stories": stories}


def log_probabilities(logits: npt.NDArray[np.float32]) -> F64:
    """Log softmax of each row: [T, V]."""
    shifted = logits - logits.max(axis=1, keepdims=True).astype(np.float64)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def compare(exact: LLM, other: LLM, documents: list[list[int]]) -> dict[str, F64]:
    """Per token: KL(exact || other), whether both prefer one token, and what the other assigns to the actual next."""
    kl, same, loss, exact_loss = [], [], [], []
    for ids in documents:
        p, q = log_probabilities(exact.logits(ids)), log_probabilities(other.logits(ids))
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append((p.argmax(axis=1) == q.argmax(axis=1)).astype(np.float64))
        following = np.arange(len(ids) - 1), np.array(ids[1:])
        loss.append(-q[:-1][following])
        exact_loss.append(-p[:-1][following])
    joined = {"kl": kl, "same": same, "loss": loss, "exact_loss": exact_loss}
    return {name: np.concatenate(parts) for name, parts in joined.items()}


def summary(values: dict[str, F64]) -> dict[str, float]:
    """The figures of one setting."""
    return {
        "tokens": len(values["kl"]),
        "kl_mean": float(values["kl"].mean()),
        "kl_95": float(np.quantile(values["kl"], 0.95)),
        "kl_max": float(values["kl"].max()),
        "top1_agreement": float(values["same"].mean()),
        "perplexity": float(np.exp(values["loss"].mean())),
        "perplexity_exact": float(np.exp(values["exact_loss"].mean())),
    }


def main() -> None:
    """Compare every setting with the exact mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tools", type=int, default=12, help="tool conversations")
    arguments = parser.parse_args()
    facts: dict[str, Any] = {"model": arguments.model, "settings": {}}
    load: dict[str, Any] = {"max_batch": 1, "stored_plan": False}
    with LLM.load(arguments.model, exact=True, **load) as exact:
        documents = texts(exact, arguments.tools)
        native = exact.runtime.config.moe.active
        settings: dict[str, dict[str, Any]] = {"fast": {"exact": False}}
        settings |= {
            f"exact, {k} of {native} experts": {"exact": True, "active_experts": k} for k in range(native)[:1:-1]
        }
        print(f"{'setting':25}{'text':9}{'tokens':>7} {'KL mean':>9} {'95 %':>9} {'max':>9} {'top-1':>7} perplexity")
        for name, changes in settings.items():
            with LLM.load(arguments.model, **load, **changes) as other:
                found = {kind: summary(compare(exact, other, ids)) for kind, ids in documents.items()}
            facts["settings"][name] = found
            for kind, f in found.items():
                print(
                    f"{name:25}{kind:9}{f['tokens']:7} {f['kl_mean']:9.5f} {f['kl_95']:9.5f} {f['kl_max']:9.4f} "
                    f"{100 * f['top1_agreement']:6.1f}% {f['perplexity']:6.3f} ({f['perplexity_exact']:.3f})",
                    flush=True,
                )
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
