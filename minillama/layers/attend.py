"""Scaled dot-product attention, by the fastest kernel for the mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from minillama.layers.mask import KernelMask

BLOCK = 256
LONG = 1024


def attend(q: Tensor, k: Tensor, v: Tensor, mask: KernelMask) -> Tensor:
    """Scaled dot-product attention softmax(q k^T / sqrt(E) + mask) v, H/K consecutive query heads per key/value head.

    torch's fused kernel, except for training on short sequences in bfloat16 on a CPU, where matrix products of whole
    blocks are 1.2 to 4 times as fast, most in the backward pass (benchmarks/README.md). They save H T^2 / 2
    attention weights for it; from `LONG` tokens on that is too much, and the fused kernel's memory is linear
    in T. `native/attention.py` is faster than both where it can be compiled.

    Args:
        q: (B, H, T, E).
        k: (B, K, S, E).
        v: (B, K, S, E).
        mask: attention mask.

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


def in_segments(
    kernel: Callable[[Tensor, Tensor, Tensor, KernelMask], Tensor], q: Tensor, k: Tensor, v: Tensor, mask: KernelMask
) -> Tensor:
    """Attention by `kernel`, called once per segment where the mask has segments."""
    if mask.segments is None:
        return kernel(q, k, v, mask)
    qs, ks, vs = (x.split(mask.segments, dim=2) for x in (q, k, v))
    causal = KernelMask(None, True)
    outputs = [kernel(*part, causal).transpose(1, 2) for part in zip(qs, ks, vs, strict=True)]
    return torch.cat(outputs, dim=1).transpose(1, 2)  # laid out as the output projection reads it


def _one_query(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """One query per head, the heads of a group along T: torch would repeat the keys and values for them."""
    rows, heads, _, width = q.shape
    grouped = q.reshape(rows, k.shape[1], -1, width)
    if allowed is not None and allowed.shape[1] == heads:
        allowed = allowed.reshape(len(allowed), k.shape[1], -1, allowed.shape[-1])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=allowed).reshape(q.shape)


def blocked_causal(q: Tensor, k: Tensor, v: Tensor, block: int = BLOCK) -> Tensor:
    """Blocked causal attention: each block of queries against the keys up to its end."""
    q = q * q.shape[-1] ** -0.5
    starts = range(0, q.shape[2], block)
    return torch.cat(
        [_last_queries(q[:, :, s : s + block], k[:, :, : s + block], v[:, :, : s + block]) for s in starts], dim=2
    )


def _last_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of scaled queries, aligned with the last keys.

    The query heads of a group are concatenated along T, so that keys are not repeated.
    """
    groups, count, end = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    queries = rearrange(q, "b (k g) t e -> b k (g t) e", g=groups)
    causal_mask = torch.full((count, end), float("-inf"), dtype=q.dtype, device=q.device).triu(end - count + 1)
    weights = torch.softmax(queries @ k.transpose(-1, -2) + causal_mask.repeat(groups, 1), dim=-1)
    return rearrange(weights @ v, "b k (g t) e -> b (k g) t e", g=groups)
