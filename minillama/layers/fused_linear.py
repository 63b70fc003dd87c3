"""Fused linear layer: several linear layers of one input as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def fused_linear(*parts: nn.Linear) -> nn.Linear:
    """Fused linear layer, frozen: outputs of the parts concatenated; all parts have a bias, or none."""
    weight = _concatenate([part.weight for part in parts])
    biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        fused.bias = nn.Parameter(_concatenate(biases), requires_grad=False)
    return fused


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenation by rows."""
    first = parts[0]
    if first.is_meta:  # concatenating there would import torch's compiler, a second or two
        return first.new_empty(sum(map(len, parts)), *first.shape[1:])
    return torch.cat(tuple(parts))
