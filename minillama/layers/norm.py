"""RMSNorm and LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillama.config import ModelConfig


def make_norm(config: ModelConfig) -> nn.Module:
    """Normalization layer of a configuration: RMSNorm, or LayerNorm with or without a bias."""
    if config.norm == "rms":
        return RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps, bias=config.norm == "layer")


class RMSNorm(nn.Module):
    """RMSNorm: y = weight * x / sqrt(mean(x^2) + eps), over the last dimension.

    The mean is taken in float32 whatever the input's dtype. Zhang and Sennrich 2019,
    arXiv 1910.07467, eq. 4; pre-normalization as in LLaMA, arXiv 2302.13971, §2.2.

    Args:
        dim: D, the width of the last dimension.
        eps: added to the mean square; LLaMA has 1e-6 or 1e-5.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the input's dtype."""
        # a weight of another dtype than the input would take the slow, unfused path
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
