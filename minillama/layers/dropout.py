"""Dropout (Srivastava et al. 2014, JMLR 15, §4) whose random numbers cost little on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dropout"]

LEVELS = 2**16
# A mask is kept for the backward pass: drawn again, it would be another one.
TAGS = (torch.Tag.nondeterministic_seeded,)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Each number of x 0 with probability p, else divided by 1 - p; x itself outside training.

    On a CPU torch draws one number after the other by a generator that makes 64 bits at once, and compiled code
    counts with Philox one by one. Here each value takes 16 of the generator's bits, so that p is a multiple of
    2**-16.

    Args:
        x: any shape.
        p: probability, 0 to 1.
        training: whether to drop anything.
    """
    if not training or not p:
        return x
    if x.device.type != "cpu" or p >= 1:
        return F.dropout(x, p)
    return x * _factors(x.detach(), min(round(p * LEVELS), LEVELS - 1))


@torch.library.custom_op("minillama::dropout_factors", mutates_args=(), tags=TAGS)
def _factors(x: Tensor, dropped: int) -> Tensor:
    """As x: 0 at about `dropped` of 2**16 places, elsewhere 1 / (1 - p)."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()] >= dropped - LEVELS // 2
    return kept.view(x.shape).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


@_factors.register_fake
def _(x: Tensor, dropped: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
