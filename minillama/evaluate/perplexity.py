"""Perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
from numpy.typing import NDArray

from minillama.config.arguments import Count, checked
from minillama.data.packing import document_ids, document_positions
from minillama.errors import InputError
from minillama.evaluate import likelihood
from minillama.inference.engine import evaluating
from minillama.inference.generate import blanks_of
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of a text.

    Args:
        nats: summed over the predicted tokens.
        tokens: number of predicted tokens.
        bytes: their UTF-8 bytes.
    """

    nats: float
    tokens: int
    bytes: float

    @property
    def nats_per_token(self) -> float:
        """Cross-entropy loss."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes

    def __add__(self, other: Score) -> Score:
        """Score of both texts together."""
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    def measures(self) -> dict[str, float]:
        """Metrics under their names in metrics.jsonl."""
        return {"val_loss": self.nats_per_token, "val_bits_per_byte": self.bits_per_byte}

    @property
    def perplexity(self) -> float:
        """Perplexity, exp of the loss."""
        return math.exp(self.nats_per_token)


def score(
    model: Decoder,
    windows: Iterable[NDArray[np.int64]],
    bytes_per_token: float,
    batch_size: int = 16,
    separator: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Score:
    """Negative log-likelihood of windows: each token but the first, given those before it.

    Args:
        model: the decoder; dropout is off meanwhile.
        windows: arrays of at most max_seq_len + 1 ids, as `Split.val_windows` yields.
        bytes_per_token: of the text, for bits per byte.
        batch_size: windows of equal length per forward pass.
        separator: id of the token that opens a document, for attention and positions within documents.
        rank: of this process among those that share the windows, each of which scores its own ones alone.
        world: number of these; all make as many passes.
    """
    nats, count = 0.0, 0
    with evaluating(model):
        for passed in _batches(windows, batch_size * world):
            own = passed[rank::world]
            rows = own if len(own) else passed[:1]
            ids = torch.from_numpy(rows).to(model.device)
            at, mask = (None, None) if separator is None else by_document(rows[:, :-1], separator, model.device)
            loss = model.loss(model.hidden(ids[:, :-1], positions=at, mask=mask), ids[:, 1:]).item()
            nats += loss if len(own) else 0.0
            count += own[:, 1:].size
    return Score(nats, count, count * bytes_per_token)


def windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Rolling windows: context and targets, each token a target once, at most `length` inputs.

    The first context is the prefix token alone, and the last window begins earlier to have as many inputs as others.
    """
    yield [prefix], ids[:length]
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[end - length - 1 : start], ids[start:end]


def by_document(rows: NDArray[np.int64], separator: int, device: torch.device) -> tuple[torch.Tensor, Mask]:
    """Positions and attention mask (B, T) of packed documents, each opened by the separator."""
    documents = torch.from_numpy(document_ids(rows, separator)).to(device)
    return torch.from_numpy(document_positions(rows, separator)).to(device), Mask(documents=documents)


@checked
def perplexity(
    model: Decoder,
    tokenizer: Tokenizer,
    text: str,
    context: Count = 0,
    advance: Callable[[int], object] = lambda tokens: None,
    rank: int = 0,
    world: int = 1,
) -> Score:
    """Perplexity and bits per byte of a text, in rolling windows, each predicted from left to right.

    Args:
        tokenizer: its tokenizer; the text follows its bos token, or eos where it has none.
        text: of one token or more.
        context: T, tokens per window; the model's context length unless given.
        advance: called with the tokens of each window that has been scored.
        rank: of this process among those that share the windows; what it gives is its part of the sums, of which the
            first one's has the bytes.
        world: number of these.

    Raises:
        InputError: an empty text, or a window longer than the model's context.
    """
    blanks, ids = blanks_of(model, tokenizer), tokenizer.encode(text)
    length = (context or model.config.max_seq_len) - (2 if blanks else 0)
    if not ids or length < 1:
        raise InputError("nothing to be scored", found=f"{len(ids)} tokens in windows of {length}", expected=">= 1")
    pairs = [[pair] for pair in windows(ids, tokenizer.bos_id, length)][rank::world]
    nats = []
    for i, found in likelihood.score(model, pairs, blanks):
        nats.append(found[0].nats)
        advance(len(pairs[i][0][1]))
    tokens = sum(len(after) for ((_, after),) in pairs)
    return Score(-math.fsum(nats), tokens, len(text.encode()) if rank == 0 else 0)


def _batches(windows: Iterable[NDArray[np.int64]], size: int) -> Iterator[NDArray[np.int64]]:
    for _, same in groupby(windows, key=len):
        while rows := list(islice(same, size)):
            yield np.stack(rows)
