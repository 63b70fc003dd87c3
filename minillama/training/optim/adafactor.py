"""Adafactor of PaLM: Adam's unfactored second moment, updates scaled by the parameter's RMS, and momentum.

Chowdhery et al. 2022 (arXiv 2204.02311, §5) after Shazeer and Stern 2018 (arXiv 1804.04235). At step k, with
beta2 = 1 - k^-0.8: V <- beta2 V + (1 - beta2) G^2; U = G / sqrt(V), divided by max(1, RMS(U)); M <- beta1 M +
(1 - beta1) U; W <- W - lr max(1e-3, RMS(W)) M - lr^2 W.

torch.optim.Adafactor factorizes V of matrices and has no momentum; on vectors without momentum the two agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

DECAY = -0.8
SMALLEST = 1e-3  # least parameter RMS that scales an update


class Adafactor(torch.optim.Optimizer):
    """Adafactor over any parameters.

    Args:
        params: parameters or groups of them.
        lr: relative learning rate; PaLM has min(1e-2, 1 / sqrt(k)).
        beta1: momentum; 0 keeps none.
        decay: weight decay of lr^2 per step.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, beta1: float = 0.9, decay: bool = True) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rate = group["lr"] / group.get("lr_scale", 1.0)  # decay is the same in all groups
                    decay = rate * rate if group["decay"] else 0.0
                    self._move(parameter, parameter.grad, group["lr"], group["beta1"], decay)

    def _move(self, parameter: Tensor, grad: Tensor, lr: float, beta1: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["variance"] = torch.zeros_like(parameter)
            if beta1:
                state["mean"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["variance"].lerp_(grad.square(), state["step"].item() ** DECAY)
        eps = torch.finfo(grad.dtype).eps
        update = grad * state["variance"].clamp(min=eps * eps).rsqrt()
        update /= _rms(update).clamp(min=1.0)
        if beta1:
            update = state["mean"].lerp_(update, 1 - beta1)
        scale = lr * max(SMALLEST, _rms(parameter).item())
        parameter.mul_(1 - decay)
        parameter.add_(update, alpha=-scale)


def _rms(x: Tensor) -> Tensor:
    return x.norm() / x.numel() ** 0.5
