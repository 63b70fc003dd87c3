"""Dropout (Srivastava et al. 2014, JMLR 15, §4) with fast random numbers on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16
# The mask is saved for the backward pass: recomputed, it would differ.
TAGS = (torch.Tag.nondeterministic_seeded,)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout: each element of x is 0 with probability p, else divided by 1 - p; identity outside training.

    On a CPU torch draws elements one by one from a 64-bit generator, and compiled code runs Philox per element.
    Here each element takes 16 of the generator's bits, so that p is a multiple of 2**-16.

    Args:
        x: any shape.
        p: probability, 0 to 1.
        training: whether dropout is active.
    """
    if not training or not p:
        return x
    if x.device.type != "cpu" or p >= 1:
        return F.dropout(x, p)
    return x * _factors(x.detach(), min(round(p * LEVELS), LEVELS - 1))


@torch.library.custom_op("minillama::dropout_factors", mutates_args=(), tags=TAGS)
def _factors(x: Tensor, dropped: int) -> Tensor:
    """Scaled dropout mask, like x: 0 with probability `dropped` / 2**16, else 1 / (1 - p)."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()] >= dropped - LEVELS // 2
    return kept.view(x.shape).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


@_factors.register_fake
def _(x: Tensor, dropped: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
