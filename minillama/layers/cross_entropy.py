"""The loss of a language model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.config.cost import loss_rows

__all__ = ["cross_entropy", "linear_cross_entropy", "softmax_grad"]

# logits, targets, weights and z_loss -> what `softmax_grad` returns
SoftmaxGrad = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

CACHED = 2**19  # logits in float32 that a processor's second cache holds
ADDED = 8  # rows of the head's gradient that are cast at once


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
        A scalar sum; divide by the sum of the weights for nats per token.
    """
    flat, ids = logits.float().flatten(0, -2), targets.flatten()
    if z_loss:
        losses = F.cross_entropy(flat, ids, reduction="none") + z_loss * flat.logsumexp(-1).square()
        return losses.sum() if weights is None else (losses * weights.flatten()).sum()
    if weights is None:
        return F.cross_entropy(flat, ids, reduction="sum")
    return (F.cross_entropy(flat, ids, reduction="none") * weights.flatten()).sum()


def linear_cross_entropy(
    hidden: Tensor,
    matrix: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    kernel: SoftmaxGrad | None = None,
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
        kernel: what computes `softmax_grad`, which is that itself unless given.
    """
    flat = hidden.flatten(0, -2)
    shares = torch.ones(len(flat), device=flat.device) if weights is None else weights.flatten().float()
    kind = flat.device.type
    if torch.is_autocast_enabled(kind):  # as for any product; inside, the types are what they are
        flat, matrix = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (flat, matrix))
    with torch.autocast(kind, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(
            flat, matrix, targets.flatten(), shares, z_loss, kernel or softmax_grad
        )
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor, z_loss: float, kernel: SoftmaxGrad
    ) -> Tensor:
        trains_hidden, trains_matrix = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if trains_hidden else None
        # (D, V): a product that is wide and not tall is twice as fast in bfloat16 on a CPU
        grad_matrix = torch.zeros(matrix.shape[::-1], device=matrix.device) if trains_matrix else None
        total = torch.zeros((), device=hidden.device)
        chunks = max(1, math.ceil(len(hidden) / loss_rows(len(matrix), hidden.element_size())))
        rows = math.ceil(len(hidden) / chunks)
        scores = hidden.new_empty(rows, len(matrix))  # the same memory for all: fresh pages would cost a fault each
        for start in range(0, len(hidden), max(1, rows)):
            part = slice(start, start + rows)
            h, share = hidden[part], weights[part, None]
            grad = torch.mm(h, matrix.T, out=scores[: len(h)])
            loss, z = kernel(grad, targets[part, None], share, z_loss)
            total += loss
            if grad_hidden is None and grad_matrix is None:
                continue
            factor = (share / z).to(hidden.dtype)  # it goes to the narrower side of each product
            if grad_hidden is not None:
                torch.mm(grad, matrix, out=grad_hidden[part]).mul_(factor)
            if grad_matrix is None:
                continue
            if grad.dtype == grad_matrix.dtype:
                grad_matrix.addmm_((h * factor).T, grad)
            else:
                product = (h * factor).T.contiguous() @ grad
                for to, rows_made in zip(grad_matrix.split(ADDED), product.split(ADDED), strict=True):
                    to += rows_made  # torch casts all that it is given before it adds
        ctx.save_for_backward(grad_hidden, grad_matrix)
        ctx.dtype = matrix.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_matrix = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_matrix is not None:  # never a second time in float32
            grad_matrix = torch.mul(grad_matrix, grad, out=torch.empty_like(grad_matrix, dtype=ctx.dtype)).T
        return grad_hidden, grad_matrix, None, None, None, None


def softmax_grad(scores: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Turn logits (rows, V) into d loss / d logits * Z / weight, in place, a few rows at a time that the cache holds.

    Returns:
        The sum of the losses, and Z = sum exp(logits - their maximum), (rows, 1).
    """
    step = max(1, CACHED // scores.shape[1] if scores.device.type == "cpu" else len(scores))
    wide = torch.empty(step, scores.shape[1], device=scores.device)
    losses, sums = [], []
    for logits, ids, share in zip(scores.split(step), targets.split(step), weights.split(step), strict=True):
        powers = wide[: len(logits)].copy_(logits)
        chosen, peak = powers.gather(-1, ids), powers.amax(-1, keepdim=True)
        z = powers.sub_(peak).exp_().sum(-1, keepdim=True)
        log_z = peak + z.log()
        losses.append(((log_z - chosen + z_loss * log_z.square()) * share).sum())
        sums.append(z)
        if z_loss:
            powers.mul_(1 + 2 * z_loss * log_z)
        logits.copy_(powers.scatter_add_(-1, ids, -z))
    return torch.stack(losses).sum(), torch.cat(sums)
