"""Two-dimensional learned position embedding (GLM): position in the text, and in the masked span."""

from __future__ import annotations

from torch import Tensor, nn

from minillama.config import ModelConfig


class BlockPositions(nn.Module):
    """2D position embedding P1[position in the corrupted text] + P2[position in the masked span, 0 outside].

    Du et al. 2022, arXiv 2103.10360, §2.1. Tokens of a span have the position of its mask token, so that the model
    does not know the span's length.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position = nn.Embedding(config.max_seq_len + 1, config.dim)
        self.block_position = nn.Embedding(config.max_seq_len + 1, config.dim)

    def forward(self, positions: Tensor) -> Tensor:
        """Position ids (2, T) or (B, 2, T) -> (T, D) or (B, T, D)."""
        position_ids, block_position_ids = positions.unbind(-2)
        return self.position(position_ids) + self.block_position(block_position_ids)
