"""Curriculum: an objective per stage, each over data of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillama.training.model_folder import ModelFolder
from minillama.training.objectives.base import Batch, Metrics, Objective
from minillama.training.objectives.compared import Compared


class Part(NamedTuple):
    """Objective from a step on, which it counts from there."""

    first: int
    objective: Objective


class Staged(Objective):
    """Curriculum (Bengio et al. 2009): each stage trains on its own data; the held-out loss is that of the run's.

    Args:
        whole: over the run's data. It trains the stages without data of their own and measures the held-out loss.
        parts: objectives on the same models, in the order of their first steps.
    """

    def __init__(self, whole: Objective, parts: Sequence[Part]) -> None:
        self.whole, self.parts, self.part = whole, parts, parts[0]
        self.best, self.writes_text, self.prompts, self.companions = (
            getattr(whole, name) for name in ("best", "writes_text", "prompts", "companions")
        )
        for part in parts:  # one start model, one reference
            if isinstance(part.objective, Compared) and isinstance(whole, Compared):
                part.objective.reference = whole.reference
        objectives = [whole, *(part.objective for part in parts)]
        self.compiles = all(objective.compiles for objective in objectives)
        self.fingerprint = sha256(" ".join(objective.fingerprint for objective in objectives).encode()).hexdigest()

    @property
    def sample(self) -> Mapping[str, Any]:  # type: ignore[override]
        """That of the whole, which is validated last."""
        return self.whole.sample

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """Those of the whole; set for all."""
        return self.whole.models

    @models.setter
    def models(self, models: Mapping[str, nn.Module]) -> None:
        for objective in (self.whole, *(part.objective for part in self.parts)):
            objective.models = models

    def at(self, step: int) -> Part:
        """Part of a step."""
        return [part for part in self.parts if part.first <= step][-1]

    def prepare(self, step: int) -> Metrics:
        self.part = self.at(step)
        return self.part.objective.prepare(step - self.part.first)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        part = self.at(step)
        return part.objective.batch(step - part.first, rank, world)

    def where(self, step: int, rows: Sequence[int]) -> list[str]:
        part = self.at(step)
        return part.objective.where(step - part.first, rows)

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Loss of the stage that was prepared last."""
        return self.part.objective.loss(batch)

    def validate(self, rows: int, limit: int) -> Metrics:
        """Held-out loss over the run's data, and `stage_` measures over those of the stage where they are others."""
        own = {} if self.part.objective is self.whole else self.part.objective.validate(rows, limit)
        return {**self.whole.validate(rows, limit), **{f"stage_{name}": value for name, value in own.items()}}

    def warnings(self, measures: Metrics) -> list[str]:
        return self.whole.warnings(measures)

    def folders(self, masters: Mapping[str, nn.Module], saved: ModelFolder) -> Mapping[str, Callable[[Path], object]]:
        return self.whole.folders(masters, saved)

    def updated(self, masters: Mapping[str, nn.Module]) -> None:
        self.part.objective.updated(masters)

    def state_dict(self) -> dict[str, Tensor]:
        """Each objective's, and the first step of the stage, whose held-out loss may still have to be recorded."""
        states = {f"{n}/{k}": v for n, objective in self._named().items() for k, v in objective.state_dict().items()}
        return {"first": torch.tensor(self.part.first), **states}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.part = self.at(int(state["first"]))
        for name, objective in self._named().items():
            start = f"{name}/"
            objective.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})

    def _named(self) -> dict[str, Objective]:
        own = {f"{i}": part.objective for i, part in enumerate(self.parts) if part.objective is not self.whole}
        return {"whole": self.whole, **own}
