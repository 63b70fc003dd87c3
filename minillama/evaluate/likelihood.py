"""How likely a model finds each of several continuations of one text: what multiple choice is scored by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from minillama.errors import InputError
from minillama.inference.engine import evaluating
from minillama.model import Decoder

__all__ = ["Likelihood", "log_likelihoods"]


class Likelihood(NamedTuple):
    """ln P(continuation | context) in nats, and whether greedy decoding would have written it."""

    nats: float
    is_greedy: bool


def log_likelihoods(model: Decoder, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Score continuations by sum_i ln P(token_i | context, tokens before i).

    The context is read once, and the state goes back to its end for each continuation.

    Args:
        model: the decoder.
        context: token ids, at least one.
        continuations: token ids, each at least one.

    Returns:
        One likelihood a continuation, in order.

    Raises:
        InputError: an empty part, or context and continuation do not fit the model's context.
    """
    longest = len(context) + max(map(len, continuations), default=0)
    if not context or not all(continuations):
        raise InputError("an empty context or continuation", fix="start a text without context with the bos token")
    if longest > model.config.max_seq_len:
        expected = f"at most {model.config.max_seq_len}"
        raise InputError("the text is longer than the model's context", found=f"{longest} tokens", expected=expected)
    with evaluating(model):
        state = model.state(1, longest)
        if len(context) > 1:
            model.hidden(_row(context[:-1], model), state=state)
        point = state.snapshot()
        scores = []
        for continuation in continuations:
            state.restore(point)
            logits = model(_row([context[-1], *continuation[:-1]], model), state=state)[0].float()
            chosen = _row(continuation, model)[0]
            nats = logits.log_softmax(-1).gather(-1, chosen[:, None]).sum().item()
            scores.append(Likelihood(nats, bool((logits.argmax(-1) == chosen).all())))
    return scores


def _row(ids: Sequence[int], model: Decoder) -> torch.Tensor:
    return torch.tensor([list(ids)], device=model.device)
