"""Tokenise all records and pack them into rows: whole documents, each row beginning with one, little padding."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from chat import EOT, render
from tokenizers import Tokenizer

Document = tuple[list[int], list[int]]
REPEAT = {"identity": 2, "countries": 2, "elements": 2, "cities": 2}  # seen this many times an epoch


def documents(records: list[dict[str, Any]], tokenizer: Tokenizer, length: int) -> list[Document]:
    """Token ids and weights; plain text is cut to the row length, longer conversations are left out."""
    pieces = [render(r) for r in records]
    encoded = iter(tokenizer.encode_batch([text for doc in pieces for text, _ in doc], add_special_tokens=False))
    out: list[Document] = []
    for record, doc in zip(records, pieces, strict=True):
        ids: list[int] = []
        weights: list[int] = []
        for _, weight in doc:
            piece = next(encoded).ids
            ids += piece
            weights += [weight] * len(piece)
        if len(ids) <= length:
            out.append((ids, weights))
        elif "text" in record:
            out.extend((ids[i : i + length], weights[i : i + length]) for i in range(0, len(ids), length))
    return out


def pack(docs: list[Document], length: int, open_rows: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Best fit over a few open rows. Rows hold one token more than the length, the last target."""
    rows: list[tuple[list[int], list[int]]] = []
    opened: list[tuple[list[int], list[int]]] = []
    for ids, weights in docs:
        room = [length + 1 - len(row[0]) - len(ids) for row in opened]
        best = min((i for i, r in enumerate(room) if r >= 0), key=room.__getitem__, default=-1)
        if best < 0:
            if len(opened) == open_rows:
                rows.append(opened.pop(max(range(open_rows), key=lambda i: len(opened[i][0]))))
            opened.append(([], []))
            best = len(opened) - 1
        opened[best][0].extend(ids)
        opened[best][1].extend(weights)
    rows += opened
    ids_out = np.full((len(rows), length + 1), EOT, dtype=np.uint16)
    weights_out = np.zeros((len(rows), length + 1), dtype=np.uint8)
    for n, (ids, weights) in enumerate(rows):
        ids_out[n, : len(ids)] = ids
        weights_out[n, : len(ids)] = weights
    return ids_out, weights_out


def work(job: tuple[list[str], Path, int, int]) -> tuple[np.ndarray, np.ndarray, Counter[str], Counter[str]]:
    """Tokenise and pack one mixed share of the records."""
    lines, path, length, seed = job
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        record = json.loads(line)
        groups.setdefault(record["source"], []).append(record)
    docs: list[Document] = []
    tokens: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for source, records in groups.items():
        made = documents(records, tokenizer, length)
        tokens[source] += sum(len(ids) for ids, _ in made)
        counts[source] += len(made)
        docs += made * REPEAT.get(source, 1)
    random.Random(seed).shuffle(docs)
    return *pack(docs, length), tokens, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="fixed.jsonl of sources.py and the generated shards"
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.ids.npy, OUT.weights.npy, OUT.json")
    parser.add_argument(
        "--heldout", type=Path, help="append every 200th generated record here instead of training on it"
    )
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    train: list[str] = []
    kept: list[str] = []
    for path in args.data:
        lines = path.read_text().splitlines()
        if args.heldout and path.stem != "fixed":
            kept += lines[::200]
            lines = [line for i, line in enumerate(lines) if i % 200]
        train += lines
    workers = os.cpu_count() or 1
    os.environ["RAYON_NUM_THREADS"] = "1"  # one process a core already
    random.Random(1).shuffle(train)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(work, [(train[i::workers], args.tokenizer, args.length, i) for i in range(workers)])
    ids, weights = (np.concatenate([part[i] for part in parts]) for i in range(2))
    tokens, counts = (sum((part[i] for part in parts), Counter[str]()) for i in (2, 3))
    np.save(args.out.with_suffix(".ids.npy"), ids)
    np.save(args.out.with_suffix(".weights.npy"), weights)
    stats = {s: {"records": counts[s], "tokens": tokens[s]} for s in sorted(tokens)}
    args.out.with_suffix(".json").write_text(json.dumps(stats, indent=1))
    if args.heldout:
        with args.heldout.open("a") as file:
            file.writelines(line + "\n" for line in kept)
    print(json.dumps(stats), f"{len(ids)} rows, {sum(tokens.values()) / 1e6:.1f} M tokens")


if __name__ == "__main__":
    main()
