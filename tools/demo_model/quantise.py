"""MLX affine quantisation in PyTorch: the encoder, its packing, and which parameters it applies to."""

from __future__ import annotations

import re

import torch

Tensor = torch.Tensor
GROUP = 64
EIGHT_BIT = re.compile(r"mlp\.(gate|shared_expert_gate)\.weight$")
UNQUANTISED = re.compile(r"norm|conv1d|A_log|dt_bias")


def bits_of(name: str) -> int:
    """4, 8 or 0 (kept as it is)."""
    if UNQUANTISED.search(name):
        return 0
    return 8 if EIGHT_BIT.search(name) else 4


def encode(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes [..., in], scales and biases [..., in/64] (bfloat16), bit for bit as `mlx.core.quantize` makes them."""
    levels = 2**bits - 1
    g = w.float().unflatten(-1, (-1, GROUP))
    low, high = g.amin(-1), g.amax(-1)
    flip = low.abs() > high.abs()
    scale = ((high - low) / levels).clamp_min(1e-7)
    scale = torch.where(flip, scale, -scale)
    edge = torch.where(flip, low, high)
    zero = torch.round(edge / scale)
    at_zero = zero == 0
    scale = torch.where(at_zero, scale, edge / torch.where(at_zero, 1.0, zero))
    bias = torch.where(at_zero, 0.0, edge)
    codes = torch.round((g - bias[..., None]) / scale[..., None]).clamp(0, levels)
    return codes.flatten(-2), scale.bfloat16(), bias.bfloat16()


def decode(codes: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
    g = codes.float().unflatten(-1, (-1, GROUP))
    return (g * scales.float()[..., None] + biases.float()[..., None]).flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint32 words, lowest bits first (as int32 bits: torch has few uint32 operations)."""
    per = 32 // bits
    words = codes.to(torch.int64).unflatten(-1, (-1, per)) << (torch.arange(per, device=codes.device) * bits)
    return (
        words.sum(-1)
        .to(torch.int64)
        .where(words.sum(-1) < 2**31, words.sum(-1) - 2**32)
        .to(torch.int32)
        .view(torch.uint32)
    )


def unpack(words: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(32 // bits) * bits
    return ((words.view(torch.int32).to(torch.int64)[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def rounded(name: str, w: Tensor) -> Tensor:
    """The value the exported file will hold for this parameter."""
    bits = bits_of(name)
    if bits:
        return decode(*encode(w, bits))
    if name.endswith("A_log"):
        return w
    if name.endswith("norm.weight") and "linear_attn.norm" not in name:  # stored as 1 + w
        return (1 + w.float()).bfloat16().float() - 1
    return w.bfloat16().float()


class FakeQuant:
    """Swap the exported values in for a step and the master weights back: the straight-through estimator.

    The gradient taken at the rounded weights is applied to the masters, so the compiled model needs no second form.
    """

    def __init__(self, named: list[tuple[str, torch.nn.Parameter]]) -> None:
        self.named = named
        self.master = [p.detach().clone() for _, p in named]

    @torch.no_grad()
    def enter(self) -> None:
        for (_, p), master in zip(self.named, self.master, strict=True):
            master.copy_(p)
        for bits in (
            4,
            8,
        ):  # groups lie along the last axis, so every matrix is a list of 64-value groups: encode all at once
            chosen = [p for n, p in self.named if bits_of(n) == bits]
            flat = rounded_flat(torch.cat([p.detach().reshape(-1) for p in chosen]), bits)
            for p, new in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
                p.copy_(new.view_as(p))
        for n, p in self.named:
            if not bits_of(n):
                p.copy_(rounded(n, p))

    @torch.no_grad()
    def leave(self) -> None:
        for (_, p), master in zip(self.named, self.master, strict=True):
            p.copy_(master)


def rounded_flat(flat: Tensor, bits: int) -> Tensor:
    return decode(*encode(flat, bits))
