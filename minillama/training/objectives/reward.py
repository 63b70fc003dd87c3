"""Reward model: a scalar per text, trained on pairs of a chosen and a rejected answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.data.preference_set import Judged, Preferences, collate
from minillama.inference.engine import evaluating
from minillama.model import Decoder
from minillama.model.heads import last, scores
from minillama.training.objectives.base import Batch, DataObjective, Metrics
from minillama.training.ranks import Ranks


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    center: float = 0.0,
    probability: Tensor | float = 1.0,
) -> Tensor:
    """Bradley-Terry loss -p log sigmoid(d) - (1 - p) log sigmoid(-d) + c (r_c + r_r)^2 of each pair, d = r_c - r_r - m.

    In nats. Ouyang et al. 2022, arXiv 2203.02155, eq. 1, which has p = 1; the margin m is Llama 2's, arXiv 2307.09288,
    eq. 2; p < 1 is the soft label of a model that judges (distilled RLAIF, Lee et al. 2023, arXiv 2309.00267).

    Args:
        chosen: (...) rewards r_c.
        rejected: (...) rewards r_r.
        margin: (...) by which they should differ.
        center: c, which keeps rewards around 0.
        probability: (...) p that the chosen answer is the better one.
    """
    d = chosen - rejected - margin
    preferred = -probability * F.logsigmoid(d) - (1 - probability) * F.logsigmoid(-d)
    return preferred + center * (chosen + rejected).square()


def wins(difference: Tensor) -> Tensor:
    """1 where a difference is positive, 1/2 where it is 0: a constant guess is right in half of the pairs."""
    return (difference > 0).float() + 0.5 * (difference == 0)


def longer_wins(rows: Sequence[Judged]) -> float:
    """Accuracy of preferring the longer answer, a baseline."""
    lengths = torch.tensor([[len(answer) for answer in row.answers] for row in rows])
    return wins(lengths[:, 0] - lengths[:, 1]).mean().item()


@dataclass(eq=False)
class RewardModel(DataObjective[Preferences]):
    """Reward modeling: the scalar head reads the last token of prompt and answer; Bradley-Terry loss.

    Args:
        center: weight of the squared sum of both rewards.
    """

    center: float = 0.0
    best: tuple[str, Literal["min", "max"]] = ("val_accuracy", "max")
    writes_text = False

    def __post_init__(self, decoder: Decoder) -> None:
        super().__post_init__(decoder)
        decoder.stop_ids |= self.data.stop_ids

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Pairs; tokens are (B, 2, T)."""
        chosen = self.data.chosen(self.seed, step, self.batch_size)
        return _batch([self.data.train[i] for i in chosen], self.data.context).share(rank, world)

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Sum of nats over the pairs, and rewards, their difference and the pairs in the right order."""
        tokens, lengths = batch.tokens.flatten(0, 1), batch.extras["lengths"]
        rewards = last(scores(self.model, tokens), lengths.flatten()).view_as(lengths)
        chosen, rejected = rewards.unbind(1)
        margin, probability = batch.extras["margin"], batch.extras["probability"]
        loss = bradley_terry(chosen, rejected, margin, self.center, probability).sum()
        chosen, rejected = chosen.detach(), rejected.detach()
        measured = {"accuracy": wins(chosen - rejected), "reward_margin": chosen - rejected}
        measured |= {"chosen_reward": chosen, "rejected_reward": rejected}
        return {"loss": loss}, {name: value.sum() for name, value in measured.items()}

    def validate(self, rows: int, limit: int) -> Metrics:
        """Nats and accuracy on held-out pairs, rewards, and the accuracy of the longer answer."""
        found, seen, ranks = defaultdict[str, float](float), list[Judged](), Ranks.current()
        with evaluating(self.model):
            for part in self.data.held_out(rows * ranks.world, limit):
                own, counts = ranks.part(len(part), rows)
                terms, measured = self.loss(_batch(part[own], self.data.context).to(self.model.device))
                for name, value in {**terms, **measured}.items():
                    found[f"val_{name}"] += counts * value.item()
                seen += part
        measures = {name: value / len(seen) for name, value in ranks.sum(found).items()}
        return measures | {"val_longer_wins": longer_wins(seen)}


def _batch(rows: Sequence[Judged], limit: int) -> Batch:
    texts = collate(rows, limit)
    ids, lengths = torch.from_numpy(texts.ids), torch.from_numpy(texts.lengths)
    labels = {"margin": [row.label for row in rows], "probability": [row.probability for row in rows]}
    extras = {"lengths": lengths, **{name: torch.tensor(values) for name, values in labels.items()}}
    return Batch(ids, ids, torch.ones(len(rows)), extras=extras)
