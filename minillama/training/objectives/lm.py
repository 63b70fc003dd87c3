"""Next-token prediction over packed text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minillama.data.corpus import Corpus
from minillama.data.packing import document_ids, document_positions
from minillama.evaluate.perplexity import Score, score
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.training.objectives.base import Batch, Stateless

__all__ = ["LanguageModel"]


class LanguageModel(Stateless):
    """loss = -sum_t log p(token_{t+1} | token_1..t), and PaLM's z-loss where asked for.

    Args:
        batch_size: rows per step.
        context: T, tokens per row.
        separator: id of the token that opens a document; with it, tokens see only their own document and
            positions start anew in each. None packs documents one behind the other in full view.
        z_loss: its weight.
    """

    def __init__(self, batch_size: int, context: int, separator: int | None = None, z_loss: float = 0.0) -> None:
        self.z_loss = z_loss
        self.batch_size = batch_size
        self.context = context
        self.separator = separator

    def batch(self, data: Corpus, seed: int, step: int) -> Batch:
        """Rows of T + 1 consecutive tokens, split into what is read and what is predicted."""
        window = data.batch(seed, step, self.batch_size, self.context)
        rows = torch.from_numpy(window)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        weights = torch.ones(targets.shape)
        if self.separator is None:
            return Batch(tokens, targets, weights)
        ids = document_ids(window[:, :-1], self.separator)
        positions = document_positions(window[:, :-1], self.separator)
        return Batch(tokens, targets, weights, Mask(documents=torch.from_numpy(ids)), torch.from_numpy(positions))

    def where(self, data: Corpus, seed: int, step: int, rows: Sequence[int]) -> list[str]:
        """Source, document and tokens of these rows."""
        return data.where(seed, step, self.batch_size, self.context, rows)

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of nats over the batch's targets, and their weight."""
        hidden = model.hidden(batch.tokens, batch.positions, batch.mask)
        loss = model.loss(hidden, batch.targets, batch.weights, self.z_loss)
        return loss, batch.weights.sum(), {}

    def validate(self, model: Decoder, data: Corpus, limit: int, rows: int) -> dict[str, float]:
        """Nats a token and bits per byte of held-out text, at the training context."""
        whole = Score(0.0, 0, 0.0)
        for split, windows in data.held_out(self.context, limit):
            whole += score(model, windows, split.bytes / split.tokens, rows)
        return whole.measures()
