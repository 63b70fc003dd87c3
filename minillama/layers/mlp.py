"""Feed-forward layers: SwiGLU and GELU MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.layers.hooks import is_own


def swiglu(x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """SwiGLU down(silu(gate(x)) * up(x)), (B, T, D) -> (B, T, D); `native/swiglu.py` is faster where compiled."""
    y: Tensor = down(F.silu(gate(x)) * up(x))
    return y


class SwiGLU(nn.Module):
    """SwiGLU feed-forward layer y = down(silu(gate(x)) * up(x)). Shazeer 2020, arXiv 2002.05202, eq. 6.

    Attributes:
        kernel: function for y, with the signature of `swiglu`.
    """

    gate_up_proj: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kernel: Callable[[Tensor, nn.Module, nn.Module, nn.Module], Tensor] = swiglu
        bias = config.bias == "all"
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=bias)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=bias)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if not self.fused:
            return self.kernel(x, self.gate_proj, self.up_proj, self.down_proj)
        if not is_own(self.kernel):
            return self.kernel(x, _Half(self.gate_up_proj, 0), _Half(self.gate_up_proj, 1), self.down_proj)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        y: Tensor = self.down_proj(F.silu(gate) * up)
        return y

    @property
    def fused(self) -> bool:
        """Whether gate_proj and up_proj are one, see `model/linears.py`."""
        return hasattr(self, "gate_up_proj")


class _Half(nn.Module):
    """Gate or up of a fused layer, for a kernel set by hand."""

    def __init__(self, fused: nn.Module, index: int) -> None:
        super().__init__()
        self.fused, self.index = fused, index

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fused(x).chunk(2, dim=-1)[self.index])


class Gelu(nn.Module):
    """GELU MLP y = down(gelu(up(x))), gelu(x) = x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Hendrycks and Gimpel 2016, arXiv 1606.08415, §2; used by BLOOM and GLM.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.bias == "all"
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=bias)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
