"""The feed-forward sublayer of GPT-2 and its kin."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from minillama.config import ModelConfig

__all__ = ["Gelu"]


class Gelu(nn.Module):
    """y = down(gelu(up(x))), gelu(x) = x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Hendrycks and Gimpel 2016, arXiv 1606.08415, §2; BLOOM and GLM have it.
    """

    fused = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.bias == "all"
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=bias)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))

    def fuse(self) -> None:
        """There is one product to begin with."""
