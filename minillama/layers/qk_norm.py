"""Attention with normalized queries and keys (Qwen3)."""

from __future__ import annotations

from torch import Tensor

from minillama.config import ModelConfig
from minillama.layers.attention import Attention
from minillama.layers.norm import RMSNorm
from minillama.layers.rope import rotate


class QKNormAttention(Attention):
    """Attention with RMSNorm of every query and key head, before the rotation; one weight per head dimension.

    Yang et al. 2025, arXiv 2505.09388, §2; after Dehghani et al. 2023, arXiv 2302.05442, §2.1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.norm_eps) for _ in range(2))

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention.heads`."""
        q, k, v = super().heads(x, None)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rope is None else (rotate(q, *rope), rotate(k, *rope), v)
