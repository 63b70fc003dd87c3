"""How well a model predicts held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
from numpy.typing import NDArray

from minillama.generation import evaluating
from minillama.layers.cross_entropy import cross_entropy
from minillama.model import Decoder

__all__ = ["Score", "score"]


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of a text.

    Args:
        nats: summed over the predicted tokens.
        tokens: how many were predicted.
        bytes: UTF-8 bytes that they stand for.
    """

    nats: float
    tokens: int
    bytes: float

    @property
    def nats_per_token(self) -> float:
        """The loss."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Exp of the loss."""
        return math.exp(self.nats_per_token)


def score(
    model: Decoder,
    windows: Iterable[NDArray[np.int64]],
    bytes_per_token: float,
    batch_size: int = 16,
) -> Score:
    """Predict each token of each window but the first.

    Args:
        model: the decoder; dropout is off meanwhile.
        windows: arrays of at most max_seq_len + 1 ids, as `Split.val_windows` yields.
        bytes_per_token: of the text, for bits a byte.
        batch_size: windows of equal length that are read together.
    """
    nats, count = 0.0, 0
    with evaluating(model):
        for rows in _batches(windows, batch_size):
            ids = torch.from_numpy(rows).to(model.device)
            nats += cross_entropy(model(ids[:, :-1]), ids[:, 1:]).item()
            count += ids[:, 1:].numel()
    return Score(nats, count, count * bytes_per_token)


def _batches(windows: Iterable[NDArray[np.int64]], size: int) -> Iterator[NDArray[np.int64]]:
    for _, same in groupby(windows, key=len):
        while rows := list(islice(same, size)):
            yield np.stack(rows)
