"""Multiple-choice scoring: tokens of contexts and continuations, sums of log-probabilities per choice, accuracies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, pairwise
from typing import Any

from minillama.errors import InputError
from minillama.evaluate.likelihood import Likelihood, lost, score
from minillama.evaluate.task import Item
from minillama.inference.generate import blanks_of
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.blanks import Blanks

Encoded = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Outcome:
    """Scores of an item.

    Args:
        prompt: the first 16 digits of the SHA-256 of the item's texts, by which equal questions are known.
        nats: ln P(continuation | context) per choice.
        characters: of the answers; none where lengths mean nothing.
        bytes: of the answers in UTF-8.
        prior: ln P(continuation | "Answer:"), where the style needs it.
        truncated: whether it lost tokens on the left, being longer than the model's context.
    """

    task: str
    id: str
    prompt: str
    subject: str
    gold: int
    nats: list[float]
    characters: list[int]
    bytes: list[int]
    prior: list[float]
    truncated: bool = False

    @property
    def metrics(self) -> list[str]:
        """Names of the accuracies that can be computed."""
        return ["acc", *["acc_norm", "acc_bytes"] * bool(self.characters), *["acc_pmi"] * bool(self.prior)]

    def choice(self, metric: str = "acc") -> int:
        """Index of the model's choice; the first of equals.

        Args:
            metric: acc: the highest sum of log-probabilities; acc_norm: per character; acc_bytes: per byte; acc_pmi:
                less the sum behind "Answer:" alone.
        """
        nats = self.nats
        if metric in ("acc_norm", "acc_bytes"):
            lengths = self.characters if metric == "acc_norm" else self.bytes
            nats = [value / max(1, length) for value, length in zip(nats, lengths, strict=True)]
        elif metric == "acc_pmi":
            nats = [value - prior for value, prior in zip(nats, self.prior, strict=True)]
        return nats.index(max(nats))

    def is_right(self, metric: str = "acc") -> bool:
        """Whether the choice is the right one."""
        return self.choice(metric) == self.gold

    @classmethod
    def of(cls, value: dict[str, Any]) -> Outcome:
        """Outcome of a line's object, which is what it should be if its accuracies can be computed."""
        outcome = cls(**value)
        hash((outcome.task, outcome.id, outcome.prompt, outcome.subject))
        for metric in outcome.metrics:
            outcome.is_right(metric)
        return outcome


def fingerprint(item: Item) -> str:
    """See `Outcome.prompt`."""
    return sha256(json.dumps([item.pairs, item.choices, item.gold, item.prior]).encode()).hexdigest()[:16]


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], special: bool = False) -> list[Encoded]:
    """Token ids of contexts and continuations, each pair encoded as one text and split behind the context.

    Whitespace at the end of a context belongs to the continuation. An empty context is the bos token. Where a token
    crosses the boundary, the continuation is encoded by itself, as text behind other text.

    Args:
        tokenizer: the model's; its bos token comes first if it adds one, and never twice.
        pairs: context and continuation.
        special: parse the names of special tokens, for contexts by a chat template.

    Raises:
        InputError: an empty continuation.
    """
    moved = [(before := context.rstrip(), context[len(before) :] + end) for context, end in pairs]
    if not all(end for _, end in moved):
        raise InputError("an empty continuation", found=next(pair for pair in pairs if not pair[1]))
    texts = list(dict.fromkeys([*(before for before, _ in moved), *(before + end for before, end in moved)]))
    encoded = [tokenizer.encode(text, special=True) for text in texts] if special else tokenizer.encode_batch(texts)
    known, found = dict(zip(texts, encoded, strict=True)), []
    for before, end in moved:
        ids, whole = known[before], known[before + end]
        if not before:
            rest = whole[1:] if whole[:1] == [tokenizer.bos_id] and len(whole) > 1 else whole
            found.append(([tokenizer.bos_id], rest))
        else:
            fits = len(whole) > len(ids) and whole[: len(ids)] == ids
            bos = [tokenizer.bos_id] * (tokenizer.add_bos and ids[:1] != [tokenizer.bos_id])
            found.append(([*bos, *ids], whole[len(ids) :] if fits else tokenizer.encode_inside(end)))
    return found


def outcomes(model: Decoder, tokenizer: Tokenizer, task: str, items: Sequence[Item]) -> Iterator[Outcome]:
    """Scores of a set's items, in the order in which they are ready.

    Raises:
        InputError: the tokenizer is not the model's; see `score`.
    """
    blanks = blanks_of(model, tokenizer)
    priors = list(dict.fromkeys(pair for item in items for pair in item.prior))
    known = dict(rolling_likelihoods(model, [[pair] for pair in encode_pairs(tokenizer, priors)], blanks))
    prior = {pair: known[i][0].nats for i, pair in enumerate(priors)}
    encoded = iter(encode_pairs(tokenizer, [pair for item in items for pair in item.pairs]))
    pairs = [[next(encoded) for _ in item.pairs] for item in items]
    for i, found in rolling_likelihoods(model, pairs, blanks):
        item = items[i]
        yield Outcome(
            task,
            item.id,
            fingerprint(item),
            item.subject,
            item.gold,
            [likelihood.nats for likelihood in found],
            [len(choice) for choice in item.choices],
            [len(choice.encode()) for choice in item.choices],
            [prior[pair] for pair in item.prior],
            any(is_truncated(pair, model.config.max_seq_len, blanks) for pair in pairs[i]),
        )


def rolling_likelihoods(
    model: Decoder, items: Sequence[Sequence[Encoded]], blanks: Blanks | None
) -> Iterator[tuple[int, list[Likelihood]]]:
    """Log-likelihoods of items as by `score`, of continuations of any length, in rolling windows.

    Yields:
        Index of an item, and the likelihoods of its pairs.
    """
    room = _room(model.config.max_seq_len, blanks)
    windows = [[_windows(pair, room) for pair in pairs] for pairs in items]
    for i, found in score(model, [[*chain.from_iterable(own)] for own in windows], blanks):
        rest = iter(found)
        parts = [[next(rest) for _ in own] for own in windows[i]]
        yield i, [Likelihood(sum(x.nats for x in own), all(x.is_greedy for x in own)) for own in parts]


def is_truncated(pair: Encoded, context: int, blanks: Blanks | None) -> bool:
    """Whether a pair is too long for the model's context."""
    return len(pair[1]) > _room(context, blanks) or lost(pair, context, blanks) > 0


def _room(context: int, blanks: Blanks | None) -> int:
    """Longest continuation; an infilling model has a mask and the start of its span before it."""
    return context - (2 if blanks else 0)


def _windows(pair: Encoded, room: int) -> list[Encoded]:
    """A pair; where the continuation is longer than `room`, parts of half of it behind what fits before each."""
    before, after = pair
    starts = [0, *range(room, len(after), max(1, room // 2)), len(after)]
    return [([*before, *after[:start]], after[start:end]) for start, end in pairwise(starts)]
