"""Single-query attention for the text generator: each batch row attends to its own prefix of a static cache."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU uses the plain twin below
    triton = None

Tensor = torch.Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    """q [B, Hq, D]; k, v [B, Hkv, L, D]; row b sees keys 0..pos[b]."""
    b, hq, d = q.shape
    hkv, length = k.shape[1:3]
    scores = torch.einsum("bhgd,bhld->bhgl", q.view(b, hkv, hq // hkv, d).float(), k.float()) * d**-0.5
    hidden = torch.arange(length, device=q.device) > pos[:, None]
    p = scores.masked_fill(hidden[:, None, None], -1e30).softmax(-1)
    return torch.einsum("bhgl,bhld->bhgd", p, v.float()).reshape(b, hq, d).to(q.dtype)


if triton is not None:

    @triton.jit
    def _kernel(q, k, v, pos, out, length, scale, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
        row, head = tl.program_id(0), tl.program_id(1)
        group = HQ // HKV
        g = tl.arange(0, 16)  # tl.dot wants at least 16 rows; those past the group are masked
        d = tl.arange(0, D)
        n = tl.arange(0, BLOCK)
        q_at = (row * HQ + head * group + g[:, None]) * D + d[None, :]
        query = tl.load(q + q_at, mask=g[:, None] < group, other=0.0)
        last = tl.load(pos + row)
        base = (row * HKV + head).to(tl.int64) * length * D
        top = tl.full((16,), -1e30, tl.float32)
        total = tl.zeros((16,), tl.float32)
        acc = tl.zeros((16, D), tl.float32)
        for first in range(0, last + 1, BLOCK):
            seen = first + n <= last
            at = base + (first + n)[:, None] * D + d[None, :]
            keys = tl.load(k + at, mask=seen[:, None], other=0.0)
            values = tl.load(v + at, mask=seen[:, None], other=0.0)
            s = tl.dot(query, tl.trans(keys)) * scale
            s = tl.where(seen[None, :], s, -1e30)
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - new[:, None])
            shrink = tl.exp(top - new)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values)
            top = new
        tl.store(out + q_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=g[:, None] < group)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    if triton is None or not q.is_cuda:
        return reference(q, k, v, pos)
    b, hq, d = q.shape
    q, out = q.contiguous(), torch.empty(b, hq, d, device=q.device, dtype=q.dtype)
    _kernel[(b, k.shape[1])](q, k, v, pos, out, k.shape[2], d**-0.5, HQ=hq, HKV=k.shape[1], D=d, BLOCK=64, num_warps=4)
    return out
