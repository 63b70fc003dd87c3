"""Cross-entropy loss of a language model, plain and fused with the output layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.config.cost import loss_rows
from minillama.errors import InputError

# signature of `softmax_grad`: logits, targets, weights, z_loss -> loss, normalizers
SoftmaxGrad = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

CACHED = 2**19  # float32 logits that fit the L2 cache
ADDED = 8  # rows of the output layer's gradient cast at once


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
    """Cross-entropy -sum_t weights_t log softmax(logits_t)[targets_t], in nats, in float32.

    The z-loss adds c log(Z_t)^2 per token, Z_t = sum exp(logits_t), which keeps logits from drifting
    (PaLM, arXiv 2204.02311, §5).

    Args:
        logits: (..., V).
        targets: (...) ids.
        weights: (...); default 1.
        z_loss: its coefficient c.

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


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities log softmax(logits)[ids] in nats, in float32: (..., V) logits and (...) ids -> (...)."""
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def linear_cross_entropy(
    hidden: Tensor,
    matrix: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    kernel: SoftmaxGrad | None = None,
) -> Tensor:
    """Fused linear cross-entropy: `cross_entropy` of hidden @ matrix^T, with the logits of one chunk at a time.

    The gradient of a chunk of tokens is computed with its logits, so that nothing is recomputed:
    d loss / d logits_t = weights_t (softmax(logits_t) (1 + 2 c log Z_t) - onehot(targets_t)).

    Args:
        hidden: (..., D).
        matrix: (V, D), of the same dtype.
        targets: (...) ids.
        weights: (...); default 1.
        z_loss: its coefficient c.
        kernel: implementation of `softmax_grad`; default: that function.
    """
    flat = hidden.flatten(0, -2)
    token_weights = torch.ones(len(flat), device=flat.device) if weights is None else weights.flatten().float()
    kind = flat.device.type
    if torch.is_autocast_enabled(kind):  # as for any linear layer; disabled inside
        flat, matrix = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (flat, matrix))
    with torch.autocast(kind, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(
            flat, matrix, targets.flatten(), token_weights, z_loss, kernel or softmax_grad
        )
    return total


def linear_log_probabilities(
    hidden: Tensor, matrix: Tensor, targets: Tensor, kernel: SoftmaxGrad | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities log softmax(hidden @ matrix^T)[targets] and entropies, with the logits of one chunk at a time.

    The backward pass computes the logits anew. Entropies have no gradient.

    Args:
        hidden: (N, D).
        matrix: (V, D), of the same dtype.
        targets: (N,) ids.
        kernel: implementation of `softmax_grad`; default: that function.

    Returns:
        (N,) log p(target) and (N,) -sum_v p_v log p_v, in nats, in float32.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden, matrix = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (hidden, matrix))
    with torch.autocast(kind, enabled=False):
        found: tuple[Tensor, Tensor] = _LinearLogProbabilities.apply(hidden, matrix, targets, kernel)
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor, z_loss: float, kernel: SoftmaxGrad
    ) -> Tensor:
        trains_hidden, trains_matrix = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if trains_hidden else None
        # (D, V): a wide matrix product is twice as fast as a tall one in bfloat16 on a CPU
        grad_matrix = torch.zeros(matrix.shape[::-1], device=matrix.device) if trains_matrix else None
        total = torch.zeros((), device=hidden.device)
        chunks = max(1, math.ceil(len(hidden) / loss_rows(len(matrix), hidden.element_size())))
        rows = math.ceil(len(hidden) / chunks)
        scores = hidden.new_empty(rows, len(matrix))  # one buffer for all chunks: fresh pages would cost page faults
        for start in range(0, len(hidden), max(1, rows)):
            part = slice(start, start + rows)
            h, weight = hidden[part], weights[part, None]
            grad = torch.mm(h, matrix.T, out=scores[: len(h)])
            loss, z = kernel(grad, targets[part, None], weight, z_loss)
            total += loss
            if grad_hidden is None and grad_matrix is None:
                continue
            factor = (weight / z).to(hidden.dtype)  # applied to the narrower side of each matrix product
            if grad_hidden is not None:
                torch.mm(grad, matrix, out=grad_hidden[part]).mul_(factor)
            if grad_matrix is None:
                continue
            if grad.dtype == grad_matrix.dtype:
                grad_matrix.addmm_((h * factor).T, grad)
            else:
                product = (h * factor).T.contiguous() @ grad
                for to, rows_made in zip(grad_matrix.split(ADDED), product.split(ADDED), strict=True):
                    to += rows_made  # torch casts the whole operand before it adds
        ctx.save_for_backward(grad_hidden, grad_matrix)
        ctx.dtype = matrix.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        grad_hidden, grad_matrix = ctx.saved_tensors  # computed with the loss: constants here
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_matrix is not None:  # no second float32 copy
            grad_matrix = torch.mul(grad_matrix, grad, out=torch.empty_like(grad_matrix, dtype=ctx.dtype)).T
        return grad_hidden, grad_matrix, None, None, None, None


class _LinearLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, targets: Tensor, kernel: SoftmaxGrad | None
    ) -> tuple[Tensor, Tensor]:
        rows = loss_rows(len(matrix), hidden.element_size())
        parts = zip(hidden.split(rows), targets.split(rows), strict=True)
        log_softmax = getattr(kernel, "log_softmax", _log_softmax_and_entropy)  # of a vocabulary over several processes
        found = [log_softmax(h @ matrix.T, ids) for h, ids in parts]
        values, entropies = (torch.cat(part) for part in zip(*found, strict=True))
        ctx.save_for_backward(hidden, matrix, targets)
        ctx.kernel = kernel
        ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        hidden, matrix, targets = ctx.saved_tensors
        trained = ctx.needs_input_grad[:2]
        leaves = [x.detach().requires_grad_(trains) for x, trains in zip((hidden, matrix), trained, strict=True)]
        with torch.enable_grad():
            total = linear_cross_entropy(leaves[0], leaves[1], targets, -grad, kernel=ctx.kernel)
        grads = iter(torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad]))
        return *(next(grads) if trains else None for trains in trained), None, None


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():  # in a backward pass: with create_graph
        raise InputError(
            "the linear cross-entropy has no second derivative (create_graph=True)",
            fix="use torch's cross_entropy over model(ids)",
        )


def _log_softmax_and_entropy(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets (rows,) and entropies (rows,) of logits (rows, V), by cache-sized blocks."""
    step = max(1, CACHED // scores.shape[1] if scores.device.type == "cpu" else len(scores))
    values, entropies = [], []
    for logits, ids in zip(scores.split(step), targets.split(step), strict=True):
        shifted = logits.float()
        shifted = shifted - shifted.amax(-1, keepdim=True)
        exps = shifted.exp()
        z = exps.sum(-1)
        values.append(shifted.gather(-1, ids[:, None])[:, 0] - z.log())
        entropies.append(z.log() - exps.mul_(shifted).sum(-1) / z)
    return torch.cat(values), torch.cat(entropies)


def softmax_grad(scores: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Softmax gradient: logits (rows, V) become d loss / d logits * Z / weight, in place, by cache-sized blocks.

    Returns:
        Sum of the losses, and normalizers Z = sum exp(logits - max), (rows, 1).
    """
    step = max(1, CACHED // scores.shape[1] if scores.device.type == "cpu" else len(scores))
    wide = torch.empty(step, scores.shape[1], device=scores.device)
    losses, sums = [], []
    for logits, ids, weight in zip(scores.split(step), targets.split(step), weights.split(step), strict=True):
        exps = wide[: len(logits)].copy_(logits)
        chosen, peak = exps.gather(-1, ids), exps.amax(-1, keepdim=True)
        z = exps.sub_(peak).exp_().sum(-1, keepdim=True)
        log_z = peak + z.log()
        losses.append(((log_z - chosen + z_loss * log_z.square()) * weight).sum())
        sums.append(z)
        if z_loss:
            exps.mul_(1 + 2 * z_loss * log_z)
        logits.copy_(exps.scatter_add_(-1, ids, -z))
    return torch.stack(losses).sum(), torch.cat(sums)
