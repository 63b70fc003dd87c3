"""The loss of a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.cost import LOGITS

__all__ = ["cross_entropy", "linear_cross_entropy"]


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
    """-sum_t weights_t log softmax(logits_t)[targets_t], in nats, in float32.

    With `z_loss` c log(Z_t)^2 is added to every token's loss, Z_t = sum exp(logits_t), which keeps logits from
    drifting (PaLM, arXiv 2204.02311, §5).

    Args:
        logits: (..., V).
        targets: (...) ids.
        weights: (...); 1 unless given.
        z_loss: c.

    Returns:
        A scalar sum; divide by the sum of the weights for nats a token.
    """
    flat, ids = logits.float().flatten(0, -2), targets.flatten()
    if z_loss:
        losses = F.cross_entropy(flat, ids, reduction="none") + z_loss * flat.logsumexp(-1).square()
        return losses.sum() if weights is None else (losses * weights.flatten()).sum()
    if weights is None:
        return F.cross_entropy(flat, ids, reduction="sum")
    return (F.cross_entropy(flat, ids, reduction="none") * weights.flatten()).sum()


def linear_cross_entropy(
    hidden: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> Tensor:
    """`cross_entropy` of hidden @ matrix^T, without ever holding the logits of more than a few tokens.

    The gradient of a chunk of tokens is made while its logits are there, so that nothing is computed twice:
    d loss / d logits_t = weights_t (softmax(logits_t) (1 + 2 c log Z_t) - onehot(targets_t)).

    Args:
        hidden: (..., D).
        matrix: (V, D), of the same type.
        targets: (...) ids.
        weights: (...); 1 unless given.
        z_loss: c.
    """
    flat = hidden.flatten(0, -2)
    shares = torch.ones(len(flat), device=flat.device) if weights is None else weights.flatten().float()
    kind = flat.device.type
    if torch.is_autocast_enabled(kind):  # as for any product; inside, the types are what they are
        flat, matrix = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (flat, matrix))
    with torch.autocast(kind, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(flat, matrix, targets.flatten(), shares, z_loss)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> Tensor:
        trains_hidden, trains_matrix = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if trains_hidden else None
        grad_matrix = torch.zeros(matrix.shape, device=matrix.device) if trains_matrix else None
        total = torch.zeros((), device=hidden.device)
        rows = max(1, LOGITS // len(matrix))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h, ids, share = hidden[part], targets[part, None], weights[part, None]
            logits = (h @ matrix.T).float()
            log_z = logits.logsumexp(-1, keepdim=True)
            losses = log_z - logits.gather(-1, ids) + z_loss * log_z.square()
            total += (losses * share).sum()
            if grad_hidden is None and grad_matrix is None:
                continue
            grad = logits.sub_(log_z).exp_().mul_(share * (1 + 2 * z_loss * log_z)).scatter_add_(-1, ids, -share)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, matrix, out=grad_hidden[part])
            if grad_matrix is None:
                continue
            if grad.dtype == grad_matrix.dtype:
                grad_matrix.addmm_(grad.T, h)
            else:
                grad_matrix += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_matrix)
        ctx.dtype = matrix.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_matrix = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_matrix is None else (grad_matrix * grad).to(ctx.dtype),
            None,
            None,
            None,
        )
