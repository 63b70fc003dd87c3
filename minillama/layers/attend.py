"""Which attention kernel computes a pattern fastest."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from minillama.layers.mask import KernelMask

__all__ = ["attend", "blocked_causal"]

BLOCK = 256
LONG = 1024


def attend(q: Tensor, k: Tensor, v: Tensor, mask: KernelMask) -> Tensor:
    """softmax(q k^T / sqrt(E) + mask) v, each key/value head serving H/K consecutive query heads.

    torch's fused kernel, but for one case: training on short texts in bfloat16 on a CPU, where products of whole
    blocks are 1.2 to 4 times as fast, most in the backward pass (benchmarks/README.md). They keep the attention
    weights for it, H T^2 / 2 of them; from `LONG` tokens on that is too much, and the fused kernel's memory grows
    with T alone. `native/attention.py` is faster than both where it can be compiled.

    Args:
        q: (B, H, T, E).
        k: (B, K, S, E).
        v: (B, K, S, E).
        mask: who sees whom.

    Returns:
        (B, H, T, E).
    """
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if mask.is_causal and on_cpu and q.shape[2] < LONG and torch.is_grad_enabled():
        return blocked_causal(q, k, v)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.shape[2] == 1:
        return _one_query(q, k, v, mask.allowed)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, is_causal=mask.is_causal, enable_gqa=grouped)


def _one_query(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """One query a head, the heads of a group laid along time: torch would repeat the keys and values for them."""
    rows, heads, _, width = q.shape
    grouped = q.reshape(rows, k.shape[1], -1, width)
    if allowed is not None and allowed.shape[1] == heads:
        allowed = allowed.reshape(len(allowed), k.shape[1], -1, allowed.shape[-1])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=allowed).reshape(q.shape)


def blocked_causal(q: Tensor, k: Tensor, v: Tensor, block: int = BLOCK) -> Tensor:
    """Causal attention one block of queries at a time, each against the keys up to its end."""
    q = q * q.shape[-1] ** -0.5
    starts = range(0, q.shape[2], block)
    return torch.cat(
        [_last_queries(q[:, :, s : s + block], k[:, :, : s + block], v[:, :, : s + block]) for s in starts], dim=2
    )


def _last_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of scaled queries that belong to the last of the keys.

    The query heads of a group are laid one behind the other along time, so that keys are not repeated.
    """
    groups, count, end = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    queries = rearrange(q, "b (k g) t e -> b k (g t) e", g=groups)
    ahead = torch.full((count, end), float("-inf"), dtype=q.dtype, device=q.device).triu(end - count + 1)
    weights = torch.softmax(queries @ k.transpose(-1, -2) + ahead.repeat(groups, 1), dim=-1)
    return rearrange(weights @ v, "b k (g t) e -> b (k g) t e", g=groups)
