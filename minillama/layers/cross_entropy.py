"""The loss of a language model."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["cross_entropy"]


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
    """-sum_t weights_t log softmax(logits_t)[targets_t], in nats, in float32.

    With `z_loss` c log(Z_t)^2 is added to every token's loss, Z_t = sum exp(logits_t), which keeps logits from
    drifting (PaLM, arXiv 2204.02311, §5).

    Args:
        logits: (B, T, V).
        targets: (B, T) ids.
        weights: (B, T); 1 unless given.
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
