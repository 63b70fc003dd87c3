"""Attention without position embedding (NoPE), in some layers of SmolLM3."""

from __future__ import annotations

from torch import Tensor

from minillama.layers.attention import Attention


class NopeAttention(Attention):
    """Attention whose queries and keys are not rotated; the causal mask alone gives an order.

    Kazemnejad et al. 2023, arXiv 2305.19466; beside layers with RoPE: Yang et al. 2025, arXiv 2501.18795.
    """

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention.heads`; `rope` is not used."""
        return super().heads(x, None)
