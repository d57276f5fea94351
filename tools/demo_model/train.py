"""Train the demo model: Muon for the matrices, AdamW for the rest, the last 15 % with quantised weights."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from export import export
from model import Config, Model
from quantise import FakeQuant
from torch import nn

Tensor = torch.Tensor


def orthogonal(g: Tensor) -> Tensor:
    """Newton-Schulz: the nearest (semi-)orthogonal matrix, roughly; batched over leading axes."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised per matrix, scaled to an update of 0.2 RMS so that AdamW's learning rates fit."""

    def __init__(self, params: list[nn.Parameter], split: set[int], momentum: float = 0.95) -> None:
        groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in params:
            groups.setdefault((*p.shape, int(id(p) in split)), []).append(p)
        self.groups = list(groups.values())
        self.split, self.momentum = split, momentum
        self.state = [torch.zeros_like(torch.stack(list(g))) for g in self.groups]

    @torch.no_grad()
    def step(self, lr: float, decay: float) -> None:
        for group, buffer in zip(self.groups, self.state, strict=True):
            grads = torch.stack([p.grad for p in group if p.grad is not None])
            buffer.lerp_(grads, 1 - self.momentum)
            update = grads.lerp(buffer, self.momentum)
            if id(group[0]) in self.split:  # gate and up are two matrices in one tensor
                update = update.unflatten(-2, (2, -1))
            scale = 0.2 * max(update.shape[-2:]) ** 0.5
            update = (orthogonal(update) * scale).reshape(grads.shape)
            for p, u in zip(group, update.to(group[0].dtype), strict=True):
                p.mul_(1 - lr * decay).sub_(u, alpha=lr)


def batches(rows: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless row numbers, reshuffled every epoch."""
    rng = np.random.default_rng(seed)
    left = np.empty(0, dtype=np.int64)
    while True:
        while len(left) < size:
            left = np.concatenate((left, rng.permutation(rows)))
        yield left[:size]
        left = left[size:]


def shape(progress: float, warm: float = 0.02, flat: float = 0.4) -> float:
    """Learning-rate factor: warm up, hold, then fall linearly to a twentieth."""
    if progress < warm:
        return progress / warm
    return 1.0 if progress < flat else 1.0 - 0.95 * (progress - flat) / (1 - flat)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the OUT of pack.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="the exported model; the newest export is always complete"
    )
    parser.add_argument("--minutes", type=float, default=16.0, help="the step count is set to fill this time")
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3, help="of the matrices")
    parser.add_argument("--lr-rest", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--quantised", type=float, default=0.15, help="last share of the steps with quantised weights")
    parser.add_argument("--export-every", type=float, default=240, help="seconds")
    parser.add_argument("--config", default="{}", help="JSON overrides of the shape, for rehearsals")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--adam-only", action="store_true", help="no Muon: to compare")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def optimisers(
    named: list[tuple[str, nn.Parameter]], lr_rest: float, adam_only: bool
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices of the layers, AdamW for embeddings, routers, gates and vectors."""
    by_adam = ("embed_tokens", "mlp.gate.", "shared_expert_gate", "in_proj_a", "in_proj_b", "conv1d")
    matrices = [p for n, p in named if p.dim() >= 2 and not adam_only and not any(key in n for key in by_adam)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    muon = Muon(matrices, {id(p) for n, p in named if "gate_up_proj" in n})
    adam = torch.optim.AdamW(rest, lr=lr_rest, betas=(0.9, 0.95), weight_decay=0.0, fused=rest[0].is_cuda)
    return muon, adam


def main() -> None:
    args = arguments()
    began = time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids_all = torch.from_numpy(np.load(args.data.with_suffix(".ids.npy")).astype(np.int32)).to(device)
    weights_all = torch.from_numpy(np.load(args.data.with_suffix(".weights.npy"))).to(device)
    model = Model(Config(**json.loads(args.config))).to(device)
    if not args.no_compile:
        for layer in model.layers:  # by layer: two graphs to compile instead of one of twelve layers
            layer.compile(dynamic=False)
    named = list(model.named_parameters())
    muon, adam = optimisers(named, args.lr_rest, args.adam_only)
    fake = FakeQuant(named)
    print(f"{sum(p.numel() for _, p in named)} parameters, {len(ids_all)} rows", flush=True)

    @torch.compile(disable=args.no_compile, dynamic=False)
    def head_loss(h: Tensor, embed: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        logits = nn.functional.linear(h, embed).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (loss * weights.flatten()).sum() / weights.sum()

    def run(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids, weights = ids_all[rows].long(), weights_all[rows, 1:].float()
        with torch.autocast(device, dtype=torch.bfloat16):
            h, balance, shares = model.hidden(ids[:, :-1])
            return head_loss(h, model.embed_tokens.weight, ids[:, 1:], weights), balance, shares

    total, step, first_time, last_export = args.steps or 10**9, 0, 0.0, time.time()
    for rows in batches(len(ids_all), args.batch, args.seed):
        if step == 60:
            first_time = time.time()
        if step == 120 and not args.steps:
            if device == "cuda":
                torch.cuda.synchronize()
            pace = (time.time() - first_time) / 60
            total = step + int((args.minutes * 60 - (time.time() - began)) / (pace * (1 + 0.05 * args.quantised)))
            print(
                f"{pace:.3f} s a step, {args.batch * (ids_all.shape[1] - 1) / pace:.0f} tokens a second: {total} steps",
                flush=True,
            )
        progress = step / total if total < 10**9 else 0.02 * min(1.0, step / 60)
        factor = shape(progress) if total < 10**9 else min(1.0, step / 60)
        quantised = progress > 1 - args.quantised
        if quantised:
            fake.enter()
        loss, balance, shares = run(torch.from_numpy(rows).to(device))
        (loss + 0.01 * balance).backward()
        if quantised:
            fake.leave()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = args.lr_rest * factor
        adam.step()
        muon.step(args.lr * factor, args.decay)
        model.zero_grad(set_to_none=True)
        step += 1
        if step % 25 == 0 or step <= 3 or step == total:
            value = loss.item()
            print(f"step {step} loss {value:.4f} balance {balance.item():.3f} least used expert {shares.min().item():.4f} norm {norm.item():.2f} "
                  f"lr {args.lr * factor:.2e} {'q ' if quantised else ''}{time.time() - began:.0f} s", flush=True)  # fmt: skip
            if not math.isfinite(value):
                raise SystemExit("the loss is not finite")
        if step >= total:
            break
        if time.time() - last_export > args.export_every:
            export(model, args.tokenizer, args.out)
            last_export = time.time()
    export(model, args.tokenizer, args.out)
    tokens = step * args.batch * (ids_all.shape[1] - 1)
    print(
        json.dumps({"steps": step, "tokens": tokens, "seconds": round(time.time() - began), "loss": value}), flush=True
    )


if __name__ == "__main__":
    main()
