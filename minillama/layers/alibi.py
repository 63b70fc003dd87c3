"""ALiBi, attention with linear biases: scores fall with distance; no position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minillama.layers.cache import CacheRange
from minillama.layers.mask import KernelMask


def slopes(n_heads: int) -> Tensor:
    """ALiBi slopes (H,): m_i = s^i with s = 2^(-8/H), i = 1..H, for a power of two.

    Other head counts take the slopes of the next smaller power of two, and for the rest every second slope of
    twice that power (ofirpress/attention_with_linear_biases, fairseq/models/transformer.py).
    """

    def geometric(count: int) -> list[float]:
        return [2 ** (-8 * i / count) for i in range(1, count + 1)]

    power = 2 ** int(math.log2(n_heads))
    return torch.tensor(geometric(power) + geometric(2 * power)[::2][: n_heads - power])


class Alibi(nn.Module):
    """ALiBi bias: score(i, j) += slope * (j - i), never positive. Press et al. 2022, arXiv 2108.12409, §3."""

    slopes: Tensor

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.register_buffer("slopes", slopes(n_heads), persistent=False)

    def forward(self, mask: KernelMask, span: CacheRange, dtype: torch.dtype) -> KernelMask:
        """Attention mask with the bias: floats (1 or B, H, T, S), added to the scores."""
        queries = span.slots(self.slopes.device)[..., :, None]
        distance = torch.arange(span.end, device=self.slopes.device) - queries  # (T, S) or (B, T, S)
        bias = self.slopes.float()[:, None, None] * distance[..., None, :, :]
        allowed = distance[..., None, :, :] <= 0 if mask.allowed is None and mask.is_causal else mask.allowed
        bias = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
        return mask._replace(allowed=(bias if bias.dim() == 4 else bias[None]).to(dtype), is_causal=False)
