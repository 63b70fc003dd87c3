"""The loss of a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.cost import loss_rows

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
        rows = max(1, min(len(hidden), loss_rows(len(matrix))))
        # the same memory for every chunk: fresh pages of this size would cost a fault each
        scores = hidden.new_empty(rows, len(matrix))
        wide = scores if scores.dtype == torch.float32 else torch.empty_like(scores, dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h, ids, share = hidden[part], targets[part, None], weights[part, None]
            products = torch.mm(h, matrix.T, out=scores[: len(h)])
            logits = products if wide is scores else wide[: len(h)].copy_(products)
            chosen, peak = logits.gather(-1, ids), logits.amax(-1, keepdim=True)
            powers = logits.sub_(peak).exp_()
            z = powers.sum(-1, keepdim=True)
            log_z = peak + z.log()
            total += ((log_z - chosen + z_loss * log_z.square()) * share).sum()
            if grad_hidden is None and grad_matrix is None:
                continue
            if z_loss:
                powers.mul_(1 + 2 * z_loss * log_z)
            powers.scatter_add_(-1, ids, -z)
            # d loss / d logits = powers * share / z; the factor goes to the narrower side of each product
            grad = powers if wide is scores else products.copy_(powers)
            factor = (share / z).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, matrix, out=grad_hidden[part]).mul_(factor)
            if grad_matrix is None:
                continue
            if grad.dtype == grad_matrix.dtype:
                grad_matrix.addmm_(grad.T, h * factor)
            else:
                grad_matrix += grad.T @ (h * factor)
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
