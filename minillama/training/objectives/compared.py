"""Objective of answers whose log-probabilities are compared with a reference's: what DPO and KTO share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.data.preference_set import Judged, Preferences, collate
from minillama.model import Decoder
from minillama.training.objectives.answers import answer_log_probabilities
from minillama.training.objectives.base import Batch, DataObjective, Metrics, rows_of
from minillama.training.objectives.reference import Reference
from minillama.training.ranks import Ranks

REFERENCE = "reference"  # log-probabilities of answers, in a batch and in a checkpoint


class HeldOut(NamedTuple):
    """Pass over held-out rows.

    Args:
        batch: on the device.
        reference: log-probabilities (B, L, T) under the reference.
        counts: 0 of a pass that a process makes because the others do; else 1.
    """

    batch: Batch
    reference: Tensor
    counts: int


@dataclass(eq=False)
class Compared(DataObjective[Preferences]):
    """Answers compared with a reference, whose log-probabilities are computed once per record and kept.

    They are computed on the rows of the micro-batches that train, so that a policy that is still the reference has
    them to the bit, and are a part of checkpoints.

    Args:
        micro_batch_size: rows at once.
    """

    micro_batch_size: int

    def __post_init__(self, decoder: Decoder) -> None:
        super().__post_init__(decoder)
        self.reference = Reference(decoder) if self.compares else None
        self.companions = dict(self.reference.companions) if self.reference else {}
        unknown = torch.nan if self.reference else 0.0
        self.known = torch.full((len(self.data.train), len(self.data.train[0].answers)), unknown)
        self._held: dict[tuple[int, int], list[Tensor]] = {}
        self.prompts = [row.prompt.tolist() for row in self.data.val[:1]]
        decoder.stop_ids |= self.data.stop_ids

    @property
    def compares(self) -> bool:
        """Whether there is a reference; without one its log-probabilities count as 0."""
        return True

    def log_probabilities(self, model: Decoder, batch: Batch) -> Tensor:
        """Log-probabilities of the answers' tokens (B, L, T), 0 elsewhere."""
        tokens, targets, answers = (
            part.flatten(0, 1) for part in (batch.tokens, batch.targets, batch.extras["answers"])
        )
        return answer_log_probabilities(model, tokens, targets, answers)[0].view_as(batch.targets)

    def prepare(self, step: int) -> Metrics:
        """Log-probabilities under the reference of the step's answers that are not known yet."""
        chosen, ranks = self.data.chosen(self.seed, step, self.batch_size), Ranks.current()
        if self.known[chosen].isnan().any():
            found = torch.zeros(len(chosen), self.known.shape[1], dtype=torch.float64)
            own = rows_of(len(chosen), ranks.rank, ranks.world)
            found[own.start : own.stop] = self._sums(self._texts(step, ranks.rank, ranks.world))
            names = [f"{row}" for row in range(found.numel())]
            summed = ranks.sum(dict(zip(names, found.flatten().tolist(), strict=True)))
            new = torch.tensor([summed[name] for name in names]).view_as(found)
            self.known[chosen] = self.known[chosen].where(~self.known[chosen].isnan(), new)
        return {}

    def _sums(self, batch: Batch, is_policy: bool = False) -> Tensor:
        """Log-probabilities (B, L) of answers under the reference, or, without a gradient, the policy."""
        found = []
        for start in range(0, len(batch.tokens), self.micro_batch_size):
            part = batch.rows(start, start + self.micro_batch_size).to(self.model.device)
            if is_policy:
                with torch.no_grad():
                    found.append(self.log_probabilities(self.model, part).sum(-1))
            else:
                assert self.reference is not None
                with self.reference.of(self.model) as reference:
                    found.append(self.log_probabilities(reference, part).sum(-1))
        return torch.cat(found).cpu()

    def _texts(self, step: int, rank: int, world: int) -> Batch:
        chosen = self.data.chosen(self.seed, step, self.batch_size)
        return batch_of([self.data.train[i] for i in chosen], self.data.context).share(rank, world)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        batch = self._texts(step, rank, world)
        own = rows_of(self.batch_size, rank, world)
        known = self.known[self.data.chosen(self.seed, step, self.batch_size)[own.start : own.stop]]
        return replace(batch, extras=batch.extras | {REFERENCE: known}, totals=self._totals(step))

    def _totals(self, step: int) -> Mapping[str, float]:
        return {"loss": float(self.batch_size)}

    def held_out(self, rows: int, limit: int) -> tuple[list[Judged], list[HeldOut]]:
        """Held-out rows of all processes, and the passes over the own ones."""
        parts, ranks = list(self.data.held_out(rows * Ranks.current().world, limit)), Ranks.current()
        own = [ranks.part(len(part), rows) for part in parts]
        batches = [self.to_batch(part[some]) for part, (some, _) in zip(parts, own, strict=True)]
        if self.reference is None:
            self._held = {(rows, limit): [torch.zeros_like(b.extras["answers"]) for b in batches]}
        elif (rows, limit) not in self._held:
            with self.reference.of(self.model) as reference:
                self._held = {(rows, limit): [self.log_probabilities(reference, batch) for batch in batches]}
        passes = zip(batches, self._held[rows, limit], (counts for _, counts in own), strict=True)
        return [row for part in parts for row in part], [HeldOut(*each) for each in passes]

    def to_batch(self, rows: Sequence[Judged]) -> Batch:
        """Batch of rows on the device."""
        return batch_of(rows, self.data.context).to(self.model.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Log-probabilities under the reference; NaN for records not met yet."""
        return {REFERENCE: self.known}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.known = state[REFERENCE]


def batch_of(rows: Sequence[Judged], limit: int) -> Batch:
    """Batch (B, L, T) of answers; `extras` has where they are, their numbers of tokens, and the labels.

    `probability` is there where it is not 1.
    """
    texts = collate(rows, limit)
    ids, lengths, counts = map(torch.from_numpy, texts)
    places = torch.arange(1, ids.shape[-1])
    ends = lengths[..., None]
    answers = (places < ends) & (places >= ends - counts[..., None])
    extras = {"answers": answers.float(), "counts": counts.float(), "label": torch.tensor([r.label for r in rows])}
    if any(row.probability != 1 for row in rows):
        extras["probability"] = torch.tensor([row.probability for row in rows])
    return Batch(ids[..., :-1], ids[..., 1:], torch.ones(len(rows)), extras=extras)
