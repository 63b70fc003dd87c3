"""Which attention kernel computes a pattern fastest."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from minillama.layers.mask import KernelMask

__all__ = ["attend", "blocked_causal"]

BLOCK = 256


def attend(q: Tensor, k: Tensor, v: Tensor, mask: KernelMask) -> Tensor:
    """softmax(q k^T / sqrt(E) + mask) v, each key/value head serving H/K consecutive query heads.

    torch's fused kernel, but for one case: causal attention in bfloat16 on a CPU, where products of whole
    blocks are 1.5 to 4 times as fast (benchmarks/README.md).

    Args:
        q: (B, H, T, E).
        k: (B, K, S, E).
        v: (B, K, S, E).
        mask: who sees whom.

    Returns:
        (B, H, T, E).
    """
    if mask.is_causal and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return blocked_causal(q, k, v)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, is_causal=mask.is_causal, enable_gqa=grouped)


def blocked_causal(q: Tensor, k: Tensor, v: Tensor, block: int = BLOCK) -> Tensor:
    """Causal attention one block of queries at a time, each against the keys up to its end.

    The query heads of a group are laid one behind the other along time, so that keys are not repeated.
    """
    groups = q.shape[1] // k.shape[1]
    q = q * q.shape[-1] ** -0.5
    out = []
    for start in range(0, q.shape[2], block):
        queries = rearrange(q[:, :, start : start + block], "b (k g) t e -> b k (g t) e", g=groups)
        count = queries.shape[2] // groups
        keys, values = k[:, :, : start + count], v[:, :, : start + count]
        ahead = torch.full((count, start + count), float("-inf"), dtype=q.dtype, device=q.device).triu(start + 1)
        weights = torch.softmax(queries @ keys.transpose(-1, -2) + ahead.repeat(groups, 1), dim=-1)
        out.append(rearrange(weights @ values, "b k (g t) e -> b (k g) t e", g=groups))
    return torch.cat(out, dim=2)
