"""The demo model in plain PyTorch for training: `qwen3_5_moe_text` with parameter names equal to the checkpoint's.

Two choices make it fast without custom kernels: the delta rule runs in chunks of 64 tokens, and every expert runs on
every token with the unchosen ones weighted zero (40 experts of 64 are one 2,560-wide matrix, cheaper than sorting).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class Config:
    vocab_size: int = 16384
    hidden_size: int = 384
    num_hidden_layers: int = 12
    full_attention_interval: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    partial_rotary_factor: float = 0.25
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    linear_conv_kernel_dim: int = 4
    linear_num_key_heads: int = 4
    linear_num_value_heads: int = 8
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    num_experts: int = 40
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 256

    @property
    def layer_types(self) -> list[str]:
        return [
            "full_attention" if (i + 1) % self.full_attention_interval == 0 else "linear_attention"
            for i in range(self.num_hidden_layers)
        ]

    def to_hf(self) -> dict[str, Any]:
        """The `text_config` of config.json."""
        fields = asdict(self)
        theta, factor = fields.pop("rope_theta"), fields.pop("partial_rotary_factor")
        third = int(self.head_dim * factor) // 2
        sections = [third - 2 * (third // 3), third // 3, third // 3]
        rope = {
            "rope_type": "default",
            "rope_theta": theta,
            "partial_rotary_factor": factor,
            "mrope_section": sections,
            "mrope_interleaved": True,
        }
        return {
            "model_type": "qwen3_5_moe_text", **fields, "layer_types": self.layer_types, "rope_parameters": rope, "rope_theta": theta,
            "partial_rotary_factor": factor, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
            "max_position_embeddings": 2048, "initializer_range": 0.02, "mamba_ssm_dtype": "float32", "mlp_only_layers": [], "tie_word_embeddings": True,
            "use_cache": True, "dtype": "bfloat16", "router_aux_loss_coef": 0.01, "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0,
        }  # fmt: skip


class Norm(nn.Module):
    """x / rms(x) * (1 + w), in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight.float())).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads, self.kv, self.dim, self.rotary = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            int(c.head_dim * c.partial_rotary_factor),
        )
        self.q_proj = nn.Linear(
            c.hidden_size, 2 * self.heads * self.dim, bias=False
        )  # per head: query rows, then gate rows
        self.k_proj = nn.Linear(c.hidden_size, self.kv * self.dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = Norm(self.dim, c.rms_norm_eps), Norm(self.dim, c.rms_norm_eps)
        self.theta = c.rope_theta

    def rope(self, x: Tensor) -> Tensor:
        half = self.rotary // 2
        freq = self.theta ** (-torch.arange(half, device=x.device).float() / half)
        angle = torch.arange(x.shape[1], device=x.device).float()[:, None] * freq
        cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
        a, b, rest = x[..., :half], x[..., half : self.rotary], x[..., self.rotary :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    def forward(self, h: Tensor) -> Tensor:
        b, t, _ = h.shape
        q, gate = self.q_proj(h).view(b, t, self.heads, 2 * self.dim).chunk(2, -1)
        q, k = self.rope(self.q_norm(q)), self.rope(self.k_norm(self.k_proj(h).view(b, t, self.kv, self.dim)))
        v = self.v_proj(h).view(b, t, self.kv, self.dim)
        k, v = (x.repeat_interleave(self.heads // self.kv, 2) for x in (k, v))
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.o_proj((o.transpose(1, 2) * gate.sigmoid()).reshape(b, t, -1))


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, size: int = 64) -> Tensor:
    """The gated delta rule in chunks (float32). q, k [B, H, T, Dk], v [B, H, T, Dv], g and beta [B, H, T]; T % size == 0.

    Inside a chunk the corrections solve a unit triangular system; only the state is carried from chunk to chunk.
    """
    b, h, t, _ = q.shape
    q, k, v = (x.view(b, h, t // size, size, -1) for x in (q, k, v))
    g, beta = g.view(b, h, -1, size).cumsum(-1), beta.view(b, h, -1, size, 1)
    below = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
    upto = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(~upto, -torch.inf).exp()
    system = ((k * beta) @ k.transpose(-1, -2) * decay).masked_fill(~below, 0.0)
    rhs = torch.cat((v * beta, k * beta * g.exp()[..., None]), -1)
    solved = torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True)
    u, w = solved.split((v.shape[-1], k.shape[-1]), -1)
    inner = q @ k.transpose(-1, -2) * decay
    q_in = q * g.exp()[..., None]
    k_out = k * (g[..., -1:] - g).exp()[..., None]
    last = g[..., -1].exp()[..., None, None]
    state = torch.zeros(b, h, k.shape[-1], v.shape[-1], device=q.device, dtype=q.dtype)
    out = []
    for n in range(t // size):
        fresh = u[:, :, n] - w[:, :, n] @ state
        out.append(q_in[:, :, n] @ state + inner[:, :, n] @ fresh)
        state = state * last[:, :, n] + k_out[:, :, n].transpose(-1, -2) @ fresh
    return torch.stack(out, 2).view(b, h, t, -1)


class GatedNorm(nn.Module):
    """The output norm of the delta net: plain weight, then the gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return (y * F.silu(gate.float())).to(gate.dtype)


class DeltaNet(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.hk, self.hv, self.dk, self.dv = (
            c.linear_num_key_heads,
            c.linear_num_value_heads,
            c.linear_key_head_dim,
            c.linear_value_head_dim,
        )
        keys, values = self.hk * self.dk, self.hv * self.dv
        self.in_proj_qkv = nn.Linear(c.hidden_size, 2 * keys + values, bias=False)
        self.in_proj_z = nn.Linear(c.hidden_size, values, bias=False)
        self.in_proj_b = nn.Linear(c.hidden_size, self.hv, bias=False)
        self.in_proj_a = nn.Linear(c.hidden_size, self.hv, bias=False)
        width = 2 * keys + values
        self.conv1d = nn.Conv1d(
            width, width, c.linear_conv_kernel_dim, groups=width, padding=c.linear_conv_kernel_dim - 1, bias=False
        )
        self.A_log = nn.Parameter(torch.empty(self.hv).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.empty(self.hv).uniform_(-6.9, -2.3))  # softplus of it: steps of 0.001 to 0.1
        self.norm = GatedNorm(self.dv, c.rms_norm_eps)
        self.out_proj = nn.Linear(values, c.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        b, t, _ = h.shape
        u = self.in_proj_qkv(h)
        kernel = self.conv1d.weight.shape[-1]
        padded = F.pad(u, (0, 0, kernel - 1, 0))
        conv = self.conv1d.weight[:, 0].to(u.dtype)
        y = F.silu(
            sum(
                (padded[:, j : j + t] * conv[:, j] for j in range(kernel)),
                torch.zeros((), device=u.device, dtype=u.dtype),
            )
        )
        with torch.autocast(h.device.type, enabled=False):
            q, k, v = y.float().split((self.hk * self.dk, self.hk * self.dk, self.hv * self.dv), -1)
            q, k = (x.view(b, t, self.hk, self.dk) for x in (q, k))
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
            q, k = (x.repeat_interleave(self.hv // self.hk, 2).transpose(1, 2) for x in (q * self.dk**-0.5, k))
            v = v.view(b, t, self.hv, self.dv).transpose(1, 2)
            beta = self.in_proj_b(h.float()).sigmoid().transpose(1, 2)
            g = (-self.A_log.float().exp() * F.softplus(self.in_proj_a(h.float()) + self.dt_bias)).transpose(1, 2)
            pad = -t % 64
            if pad:
                q, k, v, g, beta = (F.pad(x, (0, 0) * (x.dim() - 3) + (0, pad)) for x in (q, k, v, g, beta))
            o = delta_rule(q, k, v, g, beta)[:, :, :t].transpose(1, 2)
        return self.out_proj(self.norm(o, self.in_proj_z(h).view(b, t, self.hv, self.dv)).reshape(b, t, -1))


class Swiglu(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All experts as two stacks in the checkpoint's fused layout."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        e, i, h = c.num_experts, c.moe_intermediate_size, c.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, i))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [N, H]; weight [N, E], zero where an expert is not chosen."""
        e, i2, h = self.gate_up_proj.shape
        gate, up = F.linear(x, self.gate_up_proj.view(e * i2, h)).view(-1, e, i2).chunk(2, -1)
        mid = F.silu(gate) * up * weight[..., None].to(gate.dtype)
        return mid.reshape(-1, e * i2 // 2) @ self.down_proj.transpose(1, 2).reshape(e * i2 // 2, h).to(mid.dtype)


class Moe(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.k = c.num_experts_per_tok
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = Experts(c)
        self.shared_expert = Swiglu(c.hidden_size, c.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(c.hidden_size, 1, bias=False)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the load-balancing loss (1 when even) and the share of tokens per expert."""
        x = h.reshape(-1, h.shape[-1])
        with torch.autocast(h.device.type, enabled=False):
            p = self.gate(x.float()).softmax(-1)
            top, chosen = p.topk(self.k, -1)
            weight = torch.zeros_like(p).scatter(1, chosen, top / top.sum(-1, keepdim=True))
            share = torch.zeros_like(p).scatter(1, chosen, 1.0).mean(0)
            balance = (share.detach() * p.mean(0)).sum() * p.shape[-1] / self.k
        out = self.experts(x, weight) + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return out.view_as(h), balance, share


class Layer(nn.Module):
    def __init__(self, c: Config, kind: str) -> None:
        super().__init__()
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c) if kind == "full_attention" else None
        self.linear_attn = DeltaNet(c) if kind == "linear_attention" else None
        self.mlp = Moe(c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixer = self.self_attn if self.linear_attn is None else self.linear_attn
        assert mixer is not None
        x = x + mixer(self.input_layernorm(x))
        out, balance, share = self.mlp(self.post_attention_layernorm(x))
        return x + out, balance, share


class Model(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([Layer(c, kind) for kind in c.layer_types])
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        for name, p in self.named_parameters():
            if p.dim() >= 2 and "conv1d" not in name:
                out_layer = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj"))
                nn.init.normal_(p, std=0.02 / (2 * c.num_hidden_layers) ** 0.5 if out_layer else 0.02)

    def hidden(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed_tokens(ids)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.bfloat16)
        balance, shares = torch.zeros((), device=x.device), []
        for layer in self.layers:
            x, loss, share = layer(x)
            balance = balance + loss / len(self.layers)
            shares.append(share)
        return self.norm(x), balance, torch.stack(shares)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(ids)[0], self.embed_tokens.weight)

    def loss(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy over targets >= 0, the balance loss and the expert shares."""
        h, balance, shares = self.hidden(ids)
        logits = F.linear(h, self.embed_tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1), balance, shares
