"""Evaluation by several processes, each with the whole model: items shared out, all results at the first one."""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate

from minillama.evaluate.multiple_choice import Outcome, outcomes
from minillama.evaluate.perplexity import Score, perplexity
from minillama.evaluate.task import Item
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer
from minillama.training.messages import Messages
from minillama.training.ranks import Ranks

PAUSE = 0.05  # seconds between two looks for messages


def shared_outcomes(
    model: Decoder, tokenizer: Tokenizer, sets: Mapping[str, Sequence[Item]], ranks: Ranks
) -> Iterator[Outcome]:
    """Scores of all items, as they are ready, at the first process; nothing at the others, which send theirs there.

    Args:
        sets: items by set, the same in all processes.
        ranks: the processes.

    Raises:
        InputError: see `outcomes`.
    """
    messages, left = Messages(ranks), sum(map(len, sets.values()))
    for name, items in sets.items():
        for outcome in outcomes(model, tokenizer, name, share(items, ranks.rank, ranks.world)):
            if ranks.leads:
                found = [outcome, *map(Outcome.of, messages.received())]
                left -= len(found)
                yield from found
            else:
                messages.send(asdict(outcome))
    with ranks.leader_first():  # the others wait, in no collective, which would have a timeout
        while ranks.leads and left:
            found = [*map(Outcome.of, messages.received())]
            left -= len(found)
            yield from found
            time.sleep(0 if found else PAUSE)


def shared_perplexity(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    context: int,
    ranks: Ranks,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Score:
    """Perplexity of texts, each by itself, whose windows the processes share out.

    Args:
        texts: the same in all processes.
        context: see `perplexity`.
        ranks: the processes.
        advance: called at the first process with tokens that have been scored, by whichever process.

    Raises:
        InputError: see `perplexity`.
    """
    messages, own, known = Messages(ranks), Score(0.0, 0, 0), 0

    def scored(tokens: int) -> None:
        nonlocal known
        if not ranks.leads:
            messages.send(tokens)
            return
        for amount in (tokens, *messages.received()):
            known += amount
            advance(amount)

    for number, text in enumerate(texts):  # short texts have one window, which is not always the first process's
        own += perplexity(model, tokenizer, text, context, scored, (ranks.rank + number) % ranks.world, ranks.world)
    with ranks.leader_first():
        total = sum(len(tokenizer.encode(text)) for text in texts) if ranks.leads and ranks.world > 1 else 0
        while known < total:
            scored(0)
            time.sleep(PAUSE)
    found = ranks.sum(asdict(own))
    return Score(found["nats"], int(found["tokens"]), int(found["bytes"]))


def share(items: Sequence[Item], rank: int, world: int) -> list[Item]:
    """Items of one process: those that begin alike stay together, and all processes have about as much to read."""
    order, read = _in_order(items)
    total = sum(read)
    middles = (end - size / 2 for end, size in zip(accumulate(read), read, strict=True))
    return [items[i] for i, middle in zip(order, middles, strict=True) if int(middle * world / total) == rank]


def costs(items: Sequence[Item]) -> dict[str, int]:
    """Characters to read by id, for the time left; what several items begin with is read once, with the first."""
    return {items[i].id: size for i, size in zip(*_in_order(items), strict=True)}


def _in_order(items: Sequence[Item]) -> tuple[list[int], list[int]]:
    """Indices in lexicographic order of the contexts, and the characters that each item adds to those before."""
    order = sorted(range(len(items)), key=lambda i: items[i].pairs[0][0])
    found, before = [], ""
    for i in order:
        context = items[i].pairs[0][0]
        found.append(len(context) - _common(before, context) + sum(len(end) for _, end in items[i].pairs))
        before = context
    return order, found


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    return bisect(range(1, min(len(a), len(b)) + 1), 0, key=lambda size: a[:size] != b[:size])
