"""Mixed precision with float32 master weights."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn


class WorkingCopy:
    """Working copy of the weights, for the forward and backward passes.

    In float32 it is the model itself. In bfloat16 it is a copy whose weights are cast from the model's once
    per step, so that no matrix product casts its operands, and whose gradients are added to the model's in
    float32. The optimizer and every file see the float32 model alone (Micikevicius et al. 2018, arXiv
    1710.03740, §3.1; bfloat16 needs no loss scaling).

    Args:
        master: the float32 model.
        dtype: of the passes.
    """

    def __init__(self, master: nn.Module, dtype: torch.dtype) -> None:
        self.master = master
        self.model = master if dtype == next(master.parameters()).dtype else copy.deepcopy(master).to(dtype)
        self._pairs = list(zip(self.model.parameters(), master.parameters(), strict=True))
        for working, parameter in () if self.is_master else self._pairs:
            trains = working.requires_grad
            working.requires_grad_().register_post_accumulate_grad_hook(partial(_hand_over, parameter))
            working.requires_grad_(trains)  # a later stage may train what is frozen now

    @property
    def is_master(self) -> bool:
        """Whether there is no copy."""
        return self.model is self.master

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the master weights anew."""
        if self.is_master:
            return
        for working, master in self._pairs:
            working.copy_(master)


def _hand_over(master: Tensor, working: Tensor) -> None:
    """Gradient accumulation into the master weights' as each is computed, so that never all exist at once."""
    assert working.grad is not None
    if master.grad is None:
        master.grad = working.grad.to(master.dtype)
    else:
        master.grad += working.grad
    working.grad = None
