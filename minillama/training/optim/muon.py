"""Muon: momentum, orthogonalized per matrix.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon). B = mu B + (1 - mu) G; U = (1 - mu) G + mu B
(Nesterov); O approximates U's nearest orthogonal matrix, by five Newton-Schulz iterations X <- a X + (b A + c A^2) X
with A = X X^T; W <- W - lr wd W - lr sqrt(max(1, rows / columns)) O.

torch.optim.Muon is the same with matrix products always in bfloat16, two hundred times slower than float32 on
processors without such units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from minillama.training.sharded import is_sharded, local, part, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
BATCH = 2**22  # elements


class Muon(torch.optim.Optimizer):
    """Muon over matrices; sharded ones are gathered, and orthogonalized by every process alike.

    Args:
        params: parameters or groups of them, all of two dimensions.
        weight_decay: decoupled, times `lr` per step.
        momentum: mu.
        dtype: of the matrix products; bfloat16 is enough where it is fast.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameters in _batches(p for p in group["params"] if p.grad is not None):
                updates = orthogonalize(torch.stack([whole(self._update(p, momentum)) for p in parameters]), self.dtype)
                rows, columns = parameters[0].shape
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - lr * group["weight_decay"])
                    own = update[part(parameter)] if is_sharded(parameter) else update
                    local(parameter).add_(own, alpha=-lr * math.sqrt(max(1, rows / columns)))

    def _update(self, parameter: Tensor, momentum: float) -> Tensor:
        state, grad = self.state[parameter], cast(Tensor, parameter.grad)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum)


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Batches of equal shape, several matrices where they are small: batched products take two thirds of the time."""
    alike: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    for same in alike.values():
        size = max(1, BATCH // same[0].numel())
        yield from (same[start : start + size] for start in range(0, len(same), size))


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32, eps: float = 1e-7) -> Tensor:
    """Orthogonalization of (..., R, C) = U S V^T (SVD) to U S' V^T, with S' between about 0.7 and 1.2.

    Args:
        matrix: the update, or a batch (N, R, C).
        dtype: of the matrix products and the result.
        eps: lower bound of the norm.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.to(dtype).reshape(-1, *matrix.shape[-2:])
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)  # no singular value is above 1
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)
