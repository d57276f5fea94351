"""How a conversation becomes text: ChatML, with the training weight of every piece.

`chat_template.jinja` says the same for inference; test_demo_model.py compares the two.
"""

from __future__ import annotations

import json
from typing import Any

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
EOT, IM_START, IM_END = range(3)
PROMPT, REPLY = 1, 10  # tenths: prompts teach a little, replies fully

TOOLS_BEFORE = "You can call these functions:\n<tools>\n"
TOOLS_AFTER = (
    '\n</tools>\nTo call a function, write:\n<tool_call>\n{"name": the name, "arguments": the arguments}\n</tool_call>'
)


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def reply_text(message: dict[str, Any]) -> str:
    parts = [message["content"]] if message.get("content") else []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        body = dumps({"name": function["name"], "arguments": function["arguments"]})
        parts.append(f"<tool_call>\n{body}\n</tool_call>")
    return "\n".join(parts)


def render(record: dict[str, Any], generate: bool = False) -> list[tuple[str, int]]:
    """(text, weight) pieces; every piece is tokenised by itself."""
    if "text" in record:
        return [(record["text"] + SPECIAL[EOT], REPLY)]
    messages, tools = list(record["messages"]), record.get("tools")
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    if tools:
        listing = TOOLS_BEFORE + "\n".join(dumps(tool) for tool in tools) + TOOLS_AFTER
        system = f"{system}\n\n{listing}" if system else listing
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    pieces: list[tuple[str, int]] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            pieces.append((text + "<|im_start|>assistant\n", PROMPT))
            pieces.append((reply_text(message) + "<|im_end|>", REPLY))
            text = "\n"
        elif message["role"] == "tool":
            if i == 0 or messages[i - 1]["role"] != "tool":
                text += "<|im_start|>user"
            text += f"\n<tool_response>\n{message['content']}\n</tool_response>"
            if i + 1 == len(messages) or messages[i + 1]["role"] != "tool":
                text += "<|im_end|>\n"
        else:
            text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    tail = "<|im_start|>assistant\n" if generate else SPECIAL[EOT]
    return [*pieces, (text + tail, 0)]
