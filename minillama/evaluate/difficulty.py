"""Difficulty of conversations: nats per answer token of a model, or a teacher's grade; buckets from easy to hard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from minillama.inference.engine import evaluating
from minillama.inference.remote import Teacher
from minillama.model import Decoder
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.rendering import Rendered

GRADES = tuple("12345")


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


def teacher_grades(teacher: Teacher, conversations: Sequence[Conversation], question: str) -> list[float | None]:
    """Expected grades sum_g g p(g) / sum_g p(g), 1 to 5, by the probabilities of the digits that begin an answer.

    Args:
        teacher: the judge.
        conversations: what is graded.
        question: prompt with {conversation}, which asks for one digit from 1 to 5.

    Returns:
        One grade per conversation; None where the prompt is too long for the teacher or no digit has a probability.
    """
    texts = ["\n\n".join(f"{m.role}: {m.full_content}" for m in one.messages) for one in conversations]
    asked = [[{"role": "user", "content": question.format(conversation=text)}] for text in texts]
    found = []
    for nats in teacher.option_logprobs(asked, GRADES):
        shares = [math.exp(value - max(nats)) for value in nats] if max(nats) > -math.inf else []
        found.append(math.fsum(i * p for i, p in enumerate(shares, 1)) / math.fsum(shares) if shares else None)
    return found


def buckets(grades: Sequence[float], count: int) -> list[list[int]]:
    """Indices of ascending grades in parts of equal size, to one; within a part in their order."""
    order = sorted(range(len(grades)), key=grades.__getitem__)
    edges = [len(order) * part // count for part in range(count + 1)]
    return [sorted(order[start:end]) for start, end in pairwise(edges)]
