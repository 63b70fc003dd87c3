"""Kahneman-Tversky optimization: answers that were judged one by one, each good or bad."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from minillama.data.preference_set import Judged, fitted
from minillama.errors import InputError
from minillama.inference.engine import evaluating
from minillama.model import Decoder
from minillama.runs.objectives import KTOConfig
from minillama.training.objectives.base import Batch, Metrics
from minillama.training.objectives.compared import REFERENCE, Compared, batch_of
from minillama.training.objectives.reward import wins
from minillama.training.ranks import Ranks


def kto_loss(ratios: Tensor, desirable: Tensor, kl: Tensor | float, beta: float = 0.1) -> Tensor:
    """KTO loss 1 - sigmoid(beta (h - z)) of a desirable answer, 1 - sigmoid(beta (z - h)) of an undesirable one.

    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 and 8.

    Args:
        ratios: (...) log-ratios h of policy to reference, sums over the tokens of an answer.
        desirable: (...) 1 or 0.
        kl: z, the reference point, see `mismatched`.
        beta: strength of the pull towards the reference.
    """
    return 1 - (beta * (2 * desirable - 1) * (ratios - kl)).sigmoid()


def mismatched(rows: Sequence[Judged], limit: int) -> list[Judged]:
    """Each prompt with the next row's answer: the mean log-ratio of these, at least 0, is KTO's estimate of the KL.

    Raises:
        ValueError: fewer than two rows, of which one would be matched with itself.
    """
    if len(rows) < 2:
        raise ValueError("the KL of KTO needs two answers at least")
    found = []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        prompt, (answer,) = fitted(row.prompt.tolist(), [other.answers[0].tolist()], limit)
        found.append(replace(row, prompt=np.array(prompt, np.int32), answers=(np.array(answer, np.int32),)))
    return found


@dataclass(eq=False)
class KTO(Compared):
    """Kahneman-Tversky optimization.

    Args:
        settings: beta, and the weights of desirable and undesirable answers.
    """

    settings: KTOConfig = field(default_factory=KTOConfig)

    def __post_init__(self, decoder: Decoder) -> None:
        super().__post_init__(decoder)
        self.kl = 0.0
        if self.batch_size < 2:
            what, where = "KTO compares each prompt with another one's answer", "train.batch_size"
            raise InputError(what, where=where, found=self.batch_size, expected="at least 2")

    def prepare(self, step: int) -> Metrics:
        """The reference's log-probabilities, and the KL of the step: on all its rows, without a gradient."""
        super().prepare(step)
        rows = [self.data.train[i] for i in self.data.chosen(self.seed, step, self.batch_size)]
        ranks = Ranks.current()
        own = batch_of(mismatched(rows, self.data.context), self.data.context).share(ranks.rank, ranks.world)
        total = (self._sums(own, is_policy=True) - self._sums(own)).sum().item()
        self.kl = max(0.0, ranks.sum({"kl": total})["kl"] / len(rows))
        return {"kl": self.kl}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        batch = super().batch(step, rank, world)
        return replace(batch, extras=batch.extras | {"kl": torch.full((len(batch.tokens),), self.kl)})

    def _totals(self, step: int) -> Mapping[str, float]:
        rows = self.data.chosen(self.seed, step, self.batch_size)
        good = sum(self.data.train[row].label for row in rows)
        return {"loss": float(len(rows)), "desirable_reward": good, "undesirable_reward": len(rows) - good}

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Weighted sum over the answers; implicit rewards; answers on the right side of the KL."""
        settings, extras = self.settings, batch.extras
        good = extras["label"]
        ratios = (self.log_probabilities(self.model, batch).sum(-1) - extras[REFERENCE])[:, 0]
        weights = good * settings.desirable_weight + (1 - good) * settings.undesirable_weight
        loss = (weights * kto_loss(ratios, good, extras["kl"], settings.beta)).sum()
        rewards = settings.beta * ratios.detach()
        right = wins((2 * good - 1) * (ratios.detach() - extras["kl"])).sum()
        metrics = {"desirable_reward": (good * rewards).sum(), "undesirable_reward": ((1 - good) * rewards).sum()}
        return {"loss": loss}, metrics | {"accuracy": right}

    def validate(self, rows: int, limit: int) -> Metrics:
        """Loss, KL, rewards and accuracy on held-out answers, and the accuracy of the more frequent label."""
        found, ranks = defaultdict[str, float](float), Ranks.current()
        seen, passes = self.held_out(rows, limit)
        with evaluating(self.model):
            kl = self._held_out_kl(seen, rows, ranks)
            for batch, reference, times in passes:
                batch.extras.update({REFERENCE: reference.sum(-1), "kl": torch.full_like(batch.weights, kl)})
                terms, metrics = self.loss(batch)
                for name, value in {**terms, **metrics}.items():
                    found[f"val_{name}"] += times * value.item()
        good = sum(row.label for row in seen)
        counts = {"val_desirable_reward": good or 1.0, "val_undesirable_reward": len(seen) - good or 1.0}
        measures = {name: value / counts.get(name, len(seen)) for name, value in ranks.sum(found).items()}
        return measures | {"val_kl": kl, "val_majority": max(good, len(seen) - good) / len(seen)}

    def _held_out_kl(self, seen: Sequence[Judged], rows: int, ranks: Ranks) -> float:
        if len(seen) < 2:
            return 0.0
        shifted = mismatched(seen, self.data.context)
        total, size = 0.0, rows * ranks.world
        for part in (shifted[i : i + size] for i in range(0, len(shifted), size)):
            own, times = ranks.part(len(part), rows)
            batch = batch_of(part[own], self.data.context)
            total += times * (self._sums(batch, is_policy=True) - self._sums(batch)).sum().item()
        return max(0.0, ranks.sum({"kl": total})["kl"] / len(seen))
