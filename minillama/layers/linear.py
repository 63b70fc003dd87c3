"""Several products of one input as one."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["fused_linear"]


@torch.no_grad()
def fused_linear(*parts: nn.Linear) -> nn.Linear:
    """One bias-free, frozen product whose output is that of the parts side by side."""
    weight = torch.cat([part.weight for part in parts])
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    return fused
