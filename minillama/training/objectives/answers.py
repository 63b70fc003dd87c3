"""Log-probabilities of the tokens of answers: what DPO sums, PPO divides and KL subtracts. B batch, T time."""

from __future__ import annotations

import torch
from torch import Tensor

from minillama.layers.cross_entropy import linear_log_probabilities
from minillama.model import Decoder


def answer_log_probabilities(
    model: Decoder, tokens: Tensor, targets: Tensor, weights: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities log p(target_t | token_0..t) of answers, and entropies of these distributions.

    As in a `Batch` targets are the ids one place on: tokens = ids[:, :-1], targets = ids[:, 1:]. So the hidden state of
    slot t, and a value of it, is what chose target t.

    Args:
        tokens: (B, T) ids that it reads.
        targets: (B, T) ids that it predicts.
        weights: (B, T); 0 where a target is of no answer.
        temperature: that divides the logits, as in sampling.

    Returns:
        Both (B, T) in nats, in float32, and 0 where the weight is 0. The logits of one chunk exist at a time; entropies
        have no gradient.
    """
    chosen = weights != 0
    hidden = model.hidden(tokens)[chosen]
    if (scale := model.config.logit_scale / temperature) != 1:
        hidden = hidden * scale
    found = linear_log_probabilities(hidden, model.output_weight, targets[chosen], model.loss_kernel)
    empty = torch.zeros(weights.shape, device=weights.device)
    values, entropies = (empty.masked_scatter(chosen, part) for part in found)
    return values, entropies
