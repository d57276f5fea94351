"""Train the byte-level BPE of 16,384 tokens and write the tokenizer files."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from chat import ADDED, SPECIAL, render
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # one digit at a time


def texts(paths: list[Path], limit: int, seed: int) -> Iterator[str]:
    """Up to `limit` characters from every file, records in random order."""
    for path in paths:
        lines = path.read_text().splitlines()
        random.Random(seed).shuffle(lines)
        left = limit
        for line in lines:
            text = "".join(piece for piece, _ in render(json.loads(line)))
            for mark in (*SPECIAL, *ADDED):
                text = text.replace(mark, "\n")
            left -= len(text)
            if left < 0:
                break
            yield text


def train(paths: list[Path], size: int, limit: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, *ADDED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(paths, limit, 1), trainer)
    # The tool marks are ordinary text to a reader: only the ChatML marks are hidden when decoding.
    fixed = json.loads(tokenizer.to_str())
    for token in fixed["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(fixed))


def write(tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    data = json.loads(tokenizer.to_str())
    data["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    marks = (*SPECIAL, *ADDED)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {"content": t, "special": t in SPECIAL, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
                                 for i, t in enumerate(marks)},
        "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "add_bos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": 2048,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copy(Path(__file__).with_name("chat_template.jinja"), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSON lines files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=16384)
    parser.add_argument("--limit", type=int, default=30_000_000, help="characters read of each file")
    args = parser.parse_args()
    tokenizer = train(args.data, args.size, args.limit)
    assert tokenizer.get_vocab_size() == args.size, tokenizer.get_vocab_size()
    write(tokenizer, args.out)
    print("vocabulary", tokenizer.get_vocab_size(), "file", (args.out / "tokenizer.json").stat().st_size)


if __name__ == "__main__":
    main()
