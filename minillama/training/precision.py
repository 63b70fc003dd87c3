"""Mixed precision with float32 master weights."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn


class Precision:
    """Full precision: passes on the model itself, in float32 or as an engine casts it that it was given to (FSDP2)."""

    def __init__(self, master: nn.Module) -> None:
        self.model = master

    def refresh(self) -> None:
        """Called after every change of the weights."""


class WorkingCopy(Precision):
    """Working copy of the weights, for the forward and backward passes.

    Its weights are cast from the model's once per step, so that no matrix product casts its operands, and its
    gradients are added to the model's in float32. The optimizer and every file see the float32 model alone
    (Micikevicius et al. 2018, arXiv 1710.03740, §3.1; bfloat16 needs no loss scaling).
    """

    def __init__(self, master: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(copy.deepcopy(master).to(dtype))
        self._pairs = list(zip(self.model.parameters(), master.parameters(), strict=True))
        saved, own = master.state_dict(keep_vars=True), self.model.state_dict(keep_vars=True)
        self._buffers = [(own[name], saved[name]) for name in saved if not isinstance(saved[name], nn.Parameter)]
        for working, parameter in self._pairs:
            trains = working.requires_grad
            working.requires_grad_().register_post_accumulate_grad_hook(partial(_accumulate, parameter))
            working.requires_grad_(trains)  # a later stage may train what is frozen now

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the master weights anew; running statistics, which the passes change, go the other way."""
        for working, master in self._pairs:
            working.copy_(master)
        for working, master in self._buffers:
            master.copy_(working)


def choose_precision(master: nn.Module, dtype: torch.dtype) -> Precision:
    """Full precision where the weights have the dtype of the passes already, else a working copy."""
    is_same = dtype == next(master.parameters()).dtype
    return Precision(master) if is_same else WorkingCopy(master, dtype)


def _accumulate(master: Tensor, working: Tensor) -> None:
    """Gradient accumulation into the master weights' as each is computed, so that never all exist at once."""
    assert working.grad is not None
    if master.grad is None:
        master.grad = working.grad.to(master.dtype)
    else:
        master.grad += working.grad
    working.grad = None
