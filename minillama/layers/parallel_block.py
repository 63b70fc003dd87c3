"""Parallel block (PaLM): attention and feed-forward share one norm and are added at once."""

from __future__ import annotations

from torch import Tensor, nn

from minillama.layers.attention import AttentionInputs
from minillama.layers.cache import LayerState
from minillama.layers.dropout import dropout


class ParallelBlock(nn.Module):
    """Parallel block y = x + attention(norm(x)) + mlp(norm(x)). Chowdhery et al. 2022, arXiv 2204.02311, §2."""

    def __init__(self, norm: nn.Module, attention: nn.Module, mlp: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm, self.self_attn, self.mlp = norm, attention, mlp

    def forward(self, x: Tensor, inputs: AttentionInputs, state: LayerState | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); see `Attention.forward` for the rest."""
        normal = self.input_layernorm(x)
        change = self.self_attn(normal, inputs, state) + self.mlp(normal)
        return x + dropout(change, self.dropout, self.training)
