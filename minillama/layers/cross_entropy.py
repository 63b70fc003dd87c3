"""The loss of a language model."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["cross_entropy"]


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """-sum_t weights_t log softmax(logits_t)[targets_t], in nats, in float32.

    Args:
        logits: (B, T, V).
        targets: (B, T) ids.
        weights: (B, T); 1 unless given.

    Returns:
        A scalar sum; divide by the sum of the weights for nats a token.
    """
    flat, ids = logits.float().flatten(0, -2), targets.flatten()
    if weights is None:
        return F.cross_entropy(flat, ids, reduction="sum")
    return (F.cross_entropy(flat, ids, reduction="none") * weights.flatten()).sum()
