"""Gradient accumulation over micro-batches, and clipping."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from minillama.training.objectives import MODEL, Batch, Objective
from minillama.training.ranks import Ranks
from minillama.training.sharded import whole


@dataclass(frozen=True)
class Losses:
    """Means over a whole batch.

    Args:
        terms: of the loss, by name.
        metrics: what the objective measured beside it.
    """

    terms: Mapping[str, float]
    metrics: Mapping[str, float]

    @property
    def loss(self) -> float:
        """The sum of the terms, which is what is minimized."""
        return sum(self.terms.values())

    def summed(self, ranks: Ranks) -> Losses:
        """The means, of each rank's share."""
        return Losses(ranks.sum(self.terms), ranks.sum(self.metrics))

    def record(self) -> dict[str, float]:
        """What metrics.jsonl has of it: metrics, and the terms by `loss_NAME` where there are several."""
        terms = {f"loss_{name}": value for name, value in self.terms.items()} if len(self.terms) > 1 else {}
        return {**self.metrics, **terms}


def accumulate(objective: Objective, batch: Batch, size: int, device: torch.device) -> Losses:
    """Add the gradients of a batch to the parameters', `size` examples at a time.

    Each term's sum is divided by its total over the whole batch, so that neither the size nor the number of
    ranks changes anything but rounding.

    Args:
        objective: its loss, on the models of the passes.
        batch: the examples of this rank.
        size: examples per micro-batch.

    Returns:
        This rank's share of the means, all of them where it is alone.
    """
    sums, measured = defaultdict[str, float](float), defaultdict[str, float](float)
    for start in range(0, len(batch.tokens), size):
        terms, metrics = objective.loss(batch.rows(start, start + size).to(device))
        first, *others = [term / batch.total(name) for name, term in terms.items()]
        sum(others, start=first).backward()
        for name, value in terms.items():
            sums[name] += value.item()
        for name, value in metrics.items():
            measured[name] += value.item()
    shares = ({name: value / batch.total(name) for name, value in values.items()} for values in (sums, measured))
    return Losses(*shares)


def clip(models: Mapping[str, nn.Module], limit: float) -> dict[str, float]:
    """Scale each model's gradients so that their norm is at most `limit`, which 0 leaves alone; the norms before.

    The first is `grad_norm`, those of other models than `MODEL` have its name in front. Parameters that two models
    share count for the first. Of sharded tensors the norm is that of the whole.
    """
    norms, seen = {}, set[int]()
    for name, model in models.items():
        own = [parameter for parameter in model.parameters() if id(parameter) not in seen]
        seen |= set(map(id, own))
        norm = torch.nn.utils.clip_grad_norm_(own, limit or math.inf)
        norms["grad_norm" if name == MODEL else f"{name}_grad_norm"] = whole(norm).item()
    return norms


@torch.no_grad()
def is_finite(objective: Objective, part: Batch) -> bool:
    """Whether every term of these examples' loss is a number."""
    return all(math.isfinite(term.item()) for term in objective.loss(part)[0].values())
