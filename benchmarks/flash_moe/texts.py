"""Texts for the model inside the package: tool requests of its own generator, and stories that it tells itself."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestream import LLM

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "demo_model"))
import chat
import tool_calls

NAMES = ("Mia", "Leo", "Ada", "Finn", "Nora", "Otto", "Iris", "Hugo", "Lena", "Theo", "Ruth", "Emil")
HEROES = ["fox", "dragon", "little robot", "brave mouse", "old sailor", "clever owl", "young baker", "lost kitten"]


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, of which those from ``start`` on are judged."""

    ids: list[int]
    start: int


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """A request and the calls that are right."""

    prompt: list[int]
    expected: list[dict[str, Any]]


def tool_requests(llm: LLM, count: int, unseen: bool, seed: int = 99) -> tuple[list[ToolRequest], list[Text]]:
    """New requests for tools of the training, or for unseen ones, and the same with the right first reply."""
    requests, texts = [], []
    for record in tool_calls.records(count, seed, unseen):
        at = next(i for i, message in enumerate(record["messages"]) if message["role"] == "assistant")
        prompt = {**record, "messages": record["messages"][:at]}
        ids = llm.encode("".join(text for text, _ in chat.render(prompt, generate=True)))
        answer = record["messages"][at]
        requests.append(ToolRequest(ids, [call["function"] for call in answer.get("tool_calls", ())]))
        texts.append(Text(ids + llm.encode(chat.reply_text(answer) + "<|im_end|>"), len(ids)))
    return requests, texts


def stories(llm: LLM, count: int, tokens: int = 300) -> list[Text]:
    """Stories sampled from the model itself at temperature 1: its loss on them is its own entropy, no bias of ours."""
    prompts = []
    for i in range(count):
        ask = f"Tell me a story about a {HEROES[i % len(HEROES)]} named {NAMES[i // len(HEROES) % len(NAMES)]}."
        pieces = chat.render({"messages": [{"role": "user", "content": ask}]}, generate=True)
        prompts.append(llm.encode("".join(text for text, _ in pieces)))
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    texts = []
    for i, prompt in enumerate(prompts):
        done = llm.generate(prompt, max_tokens=tokens, seed=i, **sampling)
        texts.append(Text(prompt + list(done.token_ids), len(prompt)))
    return texts


def calls_in(text: str) -> list[Any] | None:
    """The calls of a reply, or None if one is not valid JSON or is left open."""
    bodies = text.split("<tool_call>")[1:]
    try:
        return [json.loads(body[: body.index("</tool_call>")]) for body in bodies]
    except ValueError:
        return None


def well_formed(calls: list[Any] | None) -> bool:
    """Whether every call is valid JSON with a name and arguments."""
    return calls is not None and all(isinstance(c, dict) and set(c) == {"name", "arguments"} for c in calls)
