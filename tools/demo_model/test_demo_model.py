"""Checks of the training tools that need no GPU: `pytest tools/demo_model` (torch and transformers installed)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))

import chat
import model as demo
import quantise
import tool_calls
import torch
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.utils.chat_template_utils import render_jinja_template


def test_model_equals_transformers() -> None:
    torch.manual_seed(0)
    config = demo.Config(vocab_size=512, num_hidden_layers=4, num_experts=8, num_experts_per_tok=3)
    ours = demo.Model(config)
    for p in ours.parameters():
        p.data += torch.randn_like(p) * 0.05
    fields = config.to_hf()
    fields.pop("model_type")
    theirs = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**fields)).float().eval()
    theirs.load_state_dict({"model." + k: v for k, v in ours.state_dict().items()}, strict=False)
    theirs.tie_weights()
    ids = torch.randint(0, 512, (2, 150))
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantise_round_trip(bits: int) -> None:
    w = torch.randn(32, 128)
    codes, scales, biases = quantise.encode(w, bits)
    assert torch.equal(quantise.unpack(quantise.pack(codes, bits), bits), codes.long())
    step = scales.float().abs().repeat_interleave(64, -1)
    error = (quantise.decode(codes, scales, biases) - w).abs()
    assert (error <= step * 1.1 + w.abs().max() / 100).all()  # scales and biases are rounded to bfloat16


def test_template_says_what_the_training_text_says() -> None:
    template = Path(__file__).with_name("chat_template.jinja").read_text()
    for record in tool_calls.records(200, seed=1, unseen=True):
        ours = "".join(text for text, _ in chat.render(record)).removesuffix(chat.SPECIAL[0])
        theirs = render_jinja_template([record["messages"]], tools=record["tools"], chat_template=template)[0][0]
        assert ours == theirs
        if record["messages"][-1]["role"] == "assistant":
            cut = {**record, "messages": record["messages"][:-1]}
            ours = "".join(text for text, _ in chat.render(cut, generate=True))
            theirs = render_jinja_template(
                [cut["messages"]], tools=cut["tools"], chat_template=template, add_generation_prompt=True
            )[0][0]
            assert ours == theirs
