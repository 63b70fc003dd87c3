"""Several products of one input as one."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["fused_linear"]


@torch.no_grad()
def fused_linear(*parts: nn.Linear) -> nn.Linear:
    """One frozen product whose output is that of the parts, which all have a bias or none, side by side."""
    weight = torch.cat([part.weight for part in parts])
    biases: list[torch.Tensor] = [part.bias for part in parts if part.bias is not None]
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return fused
