"""Difficulty of a conversation: what its answers cost a model, in nats per token; and buckets from easy to hard."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from minillama.inference.engine import evaluating
from minillama.model import Decoder
from minillama.tokenizer.rendering import Rendered


def answer_nats(model: Decoder, rendered: Rendered) -> tuple[float, float]:
    """Sum of weighted nats of the trained tokens, -sum_t w_t log p(token_t | token_1..t-1), and sum of their weights.

    Args:
        model: the decoder; dropout is off meanwhile.
        rendered: the conversation, of at most max_seq_len + 1 tokens.
    """
    ids, weights = (torch.tensor(part, device=model.device) for part in (rendered.ids, rendered.weights))
    chosen = weights[1:] != 0
    with evaluating(model):
        hidden = model.hidden(ids[None, :-1])[0][chosen]
        nats = model.loss(hidden, ids[1:][chosen], weights[1:][chosen])
    return nats.item(), weights[1:].sum().item()


def buckets(grades: Sequence[float], count: int) -> list[list[int]]:
    """Indices of ascending grades in parts of equal size, to one; within a part in their order."""
    order = sorted(range(len(grades)), key=grades.__getitem__)
    edges = [len(order) * part // count for part in range(count + 1)]
    return [sorted(order[start:end]) for start, end in pairwise(edges)]
