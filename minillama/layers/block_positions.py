"""GLM's two learned position tables: the place in the text, and the place in the blank that is filled."""

from __future__ import annotations

from torch import Tensor, nn

from minillama.config import ModelConfig

__all__ = ["BlockPositions"]


class BlockPositions(nn.Module):
    """x + P1[place in the corrupted text] + P2[place in the blank, 0 outside]. Du et al. 2022, arXiv 2103.10360, §2.1.

    A token of a blank has the place of the mask that stands for it, so that the model does not know how long
    the blank is.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position = nn.Embedding(config.max_seq_len + 1, config.dim)
        self.block_position = nn.Embedding(config.max_seq_len + 1, config.dim)

    def forward(self, positions: Tensor) -> Tensor:
        """Position ids (2, T) or (B, 2, T) -> (T, D) or (B, T, D)."""
        place, within = positions.unbind(-2)
        return self.position(place) + self.block_position(within)
