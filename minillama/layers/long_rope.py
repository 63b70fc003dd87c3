"""LongRoPE: rotary position embedding with a divisor per frequency, one set for short sequences and one for long."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.layers.rope import Rope, tables


def gain(config: ModelConfig) -> float:
    """Factor of cos and sin, sqrt(1 + ln(max_seq_len / N) / ln N), and 1 where the context is not extended."""
    return math.sqrt(1 + math.log(max(1.0, config.max_seq_len / config.short_context)) / math.log(config.short_context))


class LongRope(Rope):
    """LongRoPE: w_i / short_i up to the original context length N, w_i / long_i beyond it; cos and sin times a gain.

    Ding et al. 2024, arXiv 2402.13753; transformers,
    modeling_rope_utils.py. All tokens of a sequence have the frequencies of its length; of one that is decoded, of the
    length that its state allows.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        scaling = config.rope_scaling
        assert scaling is not None
        self.original = scaling.original_max_seq_len
        self.frequencies = self.frequencies / torch.tensor([scaling.short_factor, scaling.long_factor])  # (2, E/2)
        self.gain = gain(config)

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32, length: int = 0) -> tuple[Tensor, Tensor]:
        """See `Rope.forward`."""
        frequencies = self.frequencies[int(length > self.original)]
        cos, sin = tables(positions[..., None].float() * frequencies, torch.float32)
        return (cos * self.gain).to(dtype), (sin * self.gain).to(dtype)
