"""Fine-tuning for classification by cloze questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.data.records import Records
from minillama.evaluate.cloze import Answers, Cloze
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.training.objectives.base import Batch, Stateless

__all__ = ["ClozeQuestions"]


class ClozeQuestions(Stateless):
    """loss = -log p(label | record), p = p(words of the label | text) / sum over the labels.

    Du et al. 2022, arXiv 2103.10360, §2.4. All answers of a record are read, each in a row of its own.

    Args:
        batch_size: records a step.
        cloze: the question.
    """

    writes_text = False

    def __init__(self, batch_size: int, cloze: Cloze) -> None:
        self.batch_size, self.cloze = batch_size, cloze

    def batch(self, data: Records, seed: int, step: int) -> Batch:
        """Records with all their answers; tokens are (B, L, T)."""
        records = data.batch(seed, step, self.batch_size)
        answers = self.cloze.collate([self.cloze.layouts(record) for record in records])
        labels = torch.tensor([self.cloze.label(record) for record in records])
        extras = {"answer": answers.answer, "label": labels}
        weights = torch.ones(len(records))
        return Batch(answers.tokens, answers.targets, weights, Mask(prefix=answers.prefix), answers.positions, extras)

    def where(self, data: Records, seed: int, step: int, rows: Sequence[int]) -> list[str]:
        """File and line of these records."""
        return data.where(seed, step, self.batch_size, rows)

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of nats over the records, and how many are answered rightly."""
        positions, prefix, label = batch.positions, batch.mask.prefix, batch.extras["label"]
        assert positions is not None and prefix is not None
        scores = Answers(batch.tokens, batch.targets, batch.extras["answer"], positions, prefix).scores(model)
        right = (scores.argmax(-1) == label).sum()
        return F.cross_entropy(scores, label, reduction="sum"), batch.weights.sum(), {"accuracy": right}

    def validate(self, model: Decoder, data: Records, limit: int, rows: int) -> dict[str, float]:
        """Nats a record and accuracy on the held-out ones, beside that of always giving their commonest label.

        All held-out records are scored, whatever the limit, so that accuracies compare.
        """
        labels = [self.cloze.label(record) for record in data.val]
        asked = [self.cloze.layouts(record) for record in data.val]
        nats, right = 0.0, 0
        for label, scores in zip(labels, self.cloze.log_probabilities(model, asked, rows), strict=True):
            nats -= scores[label]
            right += scores.index(max(scores)) == label
        count = len(labels)
        return {
            "val_loss": nats / count,
            "val_accuracy": right / count,
            "val_majority": max(Counter(labels).values()) / count,
        }
