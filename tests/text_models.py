"""Models with a tokenizer and a chat template, from text to text."""

import importlib.util

from golden_models import GREEDY
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from moestream import LLM, SamplingParams

NAME = "qwen3_5-mlx4"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}<|im_start|>assistant\n{% if think %}<think>{% endif %}"
)
BACKEND = "cpu" if importlib.util.find_spec("moestream._native") else "reference"
GREEDILY = SamplingParams(temperature=0, max_tokens=GREEDY, ignore_eos=True)


def tokenizer_of(size):
    """One token for each ASCII character, then single bytes of others, then specials: exactly ``size``."""
    specials = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (not (c.isascii() or c in "ĠĊ"), c))
    vocab = {c: i for i, c in enumerate(alphabet[: size - len(specials)])}
    tokenizer = HfTokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in specials[:2]])
    tokenizer.add_tokens([AddedToken(s) for s in specials[2:]])
    assert tokenizer.get_vocab_size() == size
    return tokenizer


def load(path, **kwargs):
    return LLM.load(path, **({"backend": BACKEND, "exact": True, "ram": "2GB", "context": 256} | kwargs))


def fresh(stream):
    deltas = list(stream)
    assert [d.finish_reason is None for d in deltas] == [True] * (len(deltas) - 1) + [False]
    return "".join(d.text for d in deltas), deltas
