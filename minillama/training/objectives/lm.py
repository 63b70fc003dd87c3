"""Next-token prediction over packed text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minillama.evaluate.perplexity import Score, by_document, score
from minillama.training.objectives.base import Batch, Metrics, TextObjective, rows_of
from minillama.training.ranks import Ranks


@dataclass(eq=False)
class LanguageModel(TextObjective):
    """Language modeling: loss = -sum_t log p(token_{t+1} | token_1..t), and optionally PaLM's z-loss.

    Args:
        separator: id of the token that opens a document; with it, attention is within a document and
            positions restart in each. None packs documents without masking.
        z_loss: its weight.
    """

    separator: int | None = None
    z_loss: float = 0.0

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows of T + 1 consecutive tokens, split into inputs and targets."""
        own = rows_of(self.batch_size, rank, world)
        window = self.data.batch(self.seed, step, len(own), self.context, own.start, self.batch_size)
        ids = torch.from_numpy(window)
        tokens, targets = ids[:, :-1], ids[:, 1:]
        weights, totals = torch.ones(targets.shape), {"loss": float(self.batch_size * self.context)}
        if self.separator is None:
            return Batch(tokens, targets, weights, totals=totals)
        positions, mask = by_document(window[:, :-1], self.separator, tokens.device)
        return Batch(tokens, targets, weights, mask, positions, totals=totals)

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        hidden = self.model.hidden(batch.tokens, positions=batch.positions, mask=batch.mask)
        return {"loss": self.model.loss(hidden, batch.targets, batch.weights, self.z_loss)}, {}

    def validate(self, rows: int, limit: int) -> Metrics:
        """Nats per token and bits per byte of held-out text, at the training context."""
        own, ranks = Score(0.0, 0, 0.0), Ranks.current()
        for split, windows in self.data.held_out(self.context, limit):
            density = split.bytes / split.tokens
            own += score(self.model, windows, density, rows, self.separator, ranks.rank, ranks.world)
        return self.measures(own)
