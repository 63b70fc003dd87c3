"""Fine-tuning for classification by cloze questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.data.records import Records
from minillama.evaluate.cloze import Answers, Cloze
from minillama.layers.mask import Mask
from minillama.training.objectives.base import Batch, DataObjective, Metrics


@dataclass(eq=False)
class ClozeQuestions(DataObjective[Records]):
    """Cloze classification: loss = -log p(label | record), p = p(label words | text) / sum over the labels.

    Du et al. 2022, arXiv 2103.10360, §2.4. All answers of a record are read, each in its own row.
    """

    cloze: Cloze
    writes_text = False

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Batch of records with all answers; tokens are (B, L, T)."""
        records = self.data.batch(self.seed, step, self.batch_size)
        answers = self.cloze.collate([self.cloze.layouts(record) for record in records])
        labels = torch.tensor([self.cloze.label(record) for record in records])
        extras = {"answer": answers.weights, "label": labels}
        mask, weights = Mask(prefix=answers.prefix), torch.ones(len(records))
        batch = Batch(answers.tokens, answers.targets, weights, mask, answers.positions, extras)
        return batch.share(rank, world)

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Sum of nats over the records, and the number of correct answers."""
        positions, prefix, label = batch.positions, batch.mask.prefix, batch.extras["label"]
        assert positions is not None and prefix is not None
        scores = Answers(batch.tokens, batch.targets, batch.extras["answer"], positions, prefix).scores(self.model)
        right = (scores.argmax(-1) == label).sum()
        return {"loss": F.cross_entropy(scores, label, reduction="sum")}, {"accuracy": right}

    def validate(self, rows: int, limit: int) -> Metrics:
        """Nats per record, accuracy and the majority-label baseline on held-out records.

        All held-out records are scored, whatever the limit, so that accuracies compare.
        """
        labels = [self.cloze.label(record) for record in self.data.val]
        asked = [self.cloze.layouts(record) for record in self.data.val]
        nats, right = 0.0, 0
        for label, scores in zip(labels, self.cloze.log_probabilities(self.model, asked, rows), strict=True):
            nats -= scores[label]
            right += scores.index(max(scores)) == label
        count = len(labels)
        return {
            "val_loss": nats / count,
            "val_accuracy": right / count,
            "val_majority": max(Counter(labels).values()) / count,
        }
