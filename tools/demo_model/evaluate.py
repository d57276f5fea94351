"""Measure the shipped 4-bit model: held-out loss per source, tool calls over unseen schemas, sample answers.

The weights are decoded from the shipped files into transformers' own implementation, so this also checks the export.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import tool_calls
import torch
from chat import EOT, IM_END, REPLY, render
from pack import documents
from quantise import decode, unpack
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

Tensor = torch.Tensor
Record = dict[str, Any]
SAMPLES = (
    "Tell me a story about a fox", "Tell me a story about a fox", "Tell me a story about a brave little robot.", "Write a short story that uses the words bridge, owl and lantern.",
    "What does harbor mean?", "Define the word courage.", "What is the capital of France?", "What is the capital of Kenya?", "What is the currency of Japan?",
    "Which language is spoken in Brazil?", "What is the chemical symbol of iron?", "What is the atomic number of oxygen?", "What is 7 times 8?", "Who are you?",
    "Explain gravity simply.", "How do I make tea?", "Hi, how are you?",
)  # fmt: skip


def tensors(path: Path) -> dict[str, Tensor]:
    """The checkpoint decoded to float32 under Hugging Face names."""
    raw: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        raw.update(load_file(file))
    config = json.loads((path / "config.json").read_text())
    out: dict[str, Tensor] = {}
    for name, w in raw.items():
        if name.endswith((".scales", ".biases")):
            continue
        stem, hf = name.removesuffix(".weight"), name.removeprefix("language_model.")
        if stem + ".scales" in raw:
            bits = config["quantization"].get(stem, {}).get("bits", 4)
            out[hf] = decode(unpack(w, bits), raw[stem + ".scales"], raw[stem + ".biases"])
        elif name.endswith("conv1d.weight"):
            out[hf] = w.float().transpose(1, 2)
        elif name.endswith("norm.weight") and "linear_attn.norm" not in name:
            out[hf] = w.float() - 1
        else:
            out[hf] = w.float()
    for name in [n for n in out if "switch_mlp.gate_proj" in n]:
        stem = name.removesuffix("switch_mlp.gate_proj.weight")
        out[stem + "experts.gate_up_proj"] = torch.cat((out.pop(name), out.pop(stem + "switch_mlp.up_proj.weight")), 1)
        out[stem + "experts.down_proj"] = out.pop(stem + "switch_mlp.down_proj.weight")
    out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return out


def load(path: Path, device: str = "cpu") -> Qwen3_5MoeForCausalLM:
    fields = json.loads((path / "config.json").read_text())["text_config"]
    fields.pop("model_type")
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**fields, attn_implementation="sdpa")).float()
    model.load_state_dict(tensors(path), strict=True)
    return model.to(device).eval()


@torch.inference_mode()
def losses(
    model: Qwen3_5MoeForCausalLM, tokenizer: Tokenizer, records: list[Record], limit: int
) -> dict[str, tuple[float, int]]:
    """Mean loss of reply tokens, and their number, per source."""
    by: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by[record["source"]].append(record)
    out = {}
    for source, rows in sorted(by.items()):
        total, count = 0.0, 0
        docs = documents(random.Random(0).sample(rows, min(limit, len(rows))), tokenizer, 1024)
        docs.sort(key=lambda d: len(d[0]))
        for i in range(0, len(docs), 16):
            part = docs[i : i + 16]
            width = max(len(ids) for ids, _ in part)
            ids = torch.tensor([x + [EOT] * (width - len(x)) for x, _ in part], device=model.device)
            mask = torch.tensor(
                [[w == REPLY for w in ws] + [False] * (width - len(ws)) for _, ws in part], device=model.device
            )[:, 1:]
            logits = model(ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            ).view_as(mask)
            total, count = total + float((loss * mask).sum()), count + int(mask.sum())
        out[source] = (total / max(count, 1), count)
    return out


@torch.inference_mode()
def reply(
    model: Qwen3_5MoeForCausalLM, tokenizer: Tokenizer, prompts: list[Record], limit: int, **options: Any
) -> list[str]:
    """Replies to prompts of equal token length (so that no padding is needed)."""
    ids = [tokenizer.encode("".join(t for t, _ in render(p, generate=True))).ids for p in prompts]
    out = model.generate(
        torch.tensor(ids, device=model.device),
        max_new_tokens=limit,
        eos_token_id=[IM_END, EOT],
        pad_token_id=EOT,
        **options,
    )
    texts = []
    for row in out[:, len(ids[0]) :].tolist():
        end = next((i for i, t in enumerate(row) if t in (IM_END, EOT)), len(row))
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts


def calls_in(text: str) -> list[Any] | None:
    """The calls of a reply, or None if one is not valid JSON."""
    try:
        return [json.loads(body) for body in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)]
    except json.JSONDecodeError:
        return None


def tool_rate(
    model: Qwen3_5MoeForCausalLM, tokenizer: Tokenizer, records: list[Record], count: int
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Greedy first replies to unseen requests over unseen schemas: well-formed, and equal to the right calls."""
    tally: Counter[str] = Counter()
    wrong: list[tuple[str, str, str]] = []
    for record in [r for r in records if "tools" in r][:count]:
        at = next(i for i, m in enumerate(record["messages"]) if m["role"] == "assistant")
        prompt = {**record, "messages": record["messages"][:at]}
        expected = [c["function"] for c in record["messages"][at].get("tool_calls", ())]
        text = reply(model, tokenizer, [prompt], 160, do_sample=False)[0]
        found = calls_in(text)
        kind = {0: "no call wanted", 1: "one call", 2: "two calls"}[len(expected)]
        right = found is not None and found == expected and (bool(found) == ("<tool_call>" in text))
        tally[kind] += 1
        tally[kind + ", right"] += right
        tally["valid"] += found is not None and all(
            isinstance(c, dict) and set(c) == {"name", "arguments"} for c in found
        )
        tally["right"] += right
        tally["requests"] += 1
        print("+" if right else "-", end="", flush=True)
        if not right:
            wrong.append((record["messages"][at - 1]["content"], json.dumps(expected), text))
    return dict(tally), wrong


@torch.inference_mode()
def expert_use(model: Qwen3_5MoeForCausalLM, tokenizer: Tokenizer, records: list[Record]) -> list[tuple[float, float]]:
    """Per layer, the least and most used expert's share of tokens, relative to an even share."""
    shares: list[Tensor] = []
    k, e = model.config.num_experts_per_tok, model.config.num_experts
    norms: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda m, i, o: norms.append(i[0].reshape(-1, i[0].shape[-1]) @ m.weight.T)
        )
        for layer in model.model.layers
    ]
    ids = [t for r in records for text, _ in render(r) for t in tokenizer.encode(text).ids][:4096]
    model(torch.tensor(ids, device=model.device).view(-1, 512 if len(ids) == 4096 else len(ids)))
    for hook in hooks:
        hook.remove()
    for logits in norms:
        chosen = logits.topk(k, -1).indices.flatten()
        shares.append(torch.bincount(chosen, minlength=e).float() / len(logits) * e / k)
    return [(float(s.min()), float(s.max())) for s in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200, help="0 leaves the tool calls out")
    parser.add_argument("--known", action="store_true", help="new requests over known schemas, not unseen ones")
    parser.add_argument(
        "--limit", type=int, default=100, help="held-out records of each source; 0 leaves losses and samples out"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(args.model, device), Tokenizer.from_file(str(args.model / "tokenizer.json"))
    records = [json.loads(line) for line in args.heldout.read_text().splitlines()]
    result: dict[str, Any] = {"samples": []}
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.05}
    for user in SAMPLES if args.limit else ():
        text = reply(model, tokenizer, [{"messages": [{"role": "user", "content": user}]}], 300, **options)[0]
        result["samples"].append((user, text))
        print(f"> {user}\n{text}\n", flush=True)
    if args.limit:
        result["losses"] = losses(model, tokenizer, records, args.limit)
        for source, (loss, count) in result["losses"].items():
            print(f"{source:16} {loss:.3f} over {count} tokens", flush=True)
        result["experts"] = expert_use(model, tokenizer, random.Random(0).sample(records, min(300, len(records))))
        print(
            "expert use, least and most, relative:",
            [(round(a, 2), round(b, 2)) for a, b in result["experts"]],
            flush=True,
        )
    if args.known:
        records = list(tool_calls.records(args.requests, seed=99, unseen=False))
    if args.requests:
        result["tools"], result["wrong"] = tool_rate(model, tokenizer, records, args.requests)
        print(result["tools"], flush=True)
        for ask, expected, text in result["wrong"][:12]:
            print(f"  {ask}\n    wanted {expected}\n    got    {text!r}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
