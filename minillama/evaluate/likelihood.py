"""Log-likelihood of several continuations of one context, by which multiple choice is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from minillama.errors import InputError
from minillama.inference.engine import evaluating
from minillama.layers.cross_entropy import log_probabilities
from minillama.model import Decoder


class Likelihood(NamedTuple):
    """Log-likelihood ln P(continuation | context) in nats, and whether greedy decoding gives the continuation."""

    nats: float
    is_greedy: bool


def log_likelihoods(model: Decoder, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Log-likelihoods sum_i ln P(token_i | context, tokens before i) of continuations.

    The context is prefilled once, and the state is restored to its end for each continuation.

    Args:
        model: the decoder.
        context: token ids, at least one.
        continuations: token ids, each at least one.

    Returns:
        One likelihood per continuation, in order.

    Raises:
        InputError: an empty part, or context and continuation do not fit the model's context.
    """
    longest = len(context) + max(map(len, continuations), default=0)
    if not context or not all(continuations):
        raise InputError("an empty context or continuation", fix="use the bos token where there is no context")
    if longest > model.config.max_seq_len:
        expected = f"at most {model.config.max_seq_len}"
        what = "the sequence is longer than the model's context"
        raise InputError(what, found=f"{longest} tokens", expected=expected)
    with evaluating(model):
        state = model.state(1, longest)
        if len(context) > 1:
            model.hidden(_row(context[:-1], model), state=state)
        point = state.snapshot()
        scores = []
        for continuation in continuations:
            state.restore(point)
            logits = model(_row([context[-1], *continuation[:-1]], model), state=state)[0]
            chosen = _row(continuation, model)[0]
            nats = log_probabilities(logits, chosen).sum().item()
            scores.append(Likelihood(nats, bool((logits.argmax(-1) == chosen).all())))
    return scores


def _row(ids: Sequence[int], model: Decoder) -> torch.Tensor:
    return torch.tensor([list(ids)], device=model.device)
