"""What a training objective is, and the batch it works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from minillama.layers.mask import Mask
from minillama.model import Decoder

__all__ = ["Batch", "Objective", "Stateless"]


@dataclass(frozen=True)
class Batch:
    """The examples of one optimizer step, over all micro-batches.

    Args:
        tokens: (B, T) ids that the model reads.
        targets: (B, T) ids that it should predict.
        weights: (B, T) float weights of the targets; 0 leaves one out. (B,) where a row is judged as a whole.
        mask: who sees whom.
        positions: (B, T) position ids, where they are not 0..T-1.
        extras: further (B, ...) tensors that an objective needs.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    mask: Mask = field(default_factory=Mask)
    positions: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> Batch:
        """The examples start..stop-1."""
        return self._map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Any) -> Batch:
        mask = {f.name: getattr(self.mask, f.name) for f in fields(self.mask)}
        moved = {name: change(value) for name, value in mask.items() if isinstance(value, Tensor)}
        return Batch(
            change(self.tokens),
            change(self.targets),
            change(self.weights),
            replace(self.mask, **moved),
            None if self.positions is None else change(self.positions),
            {name: change(value) for name, value in self.extras.items()},
        )


class Objective(Protocol):
    """What is minimized. One file an objective; `objectives.make` chooses.

    The loss is a sum and a weight, not a mean: the trainer divides the sums of all micro-batches by the
    weight of the whole batch, so that accumulation changes nothing.
    """

    writes_text: bool
    """Whether a sample of the model's text shows what it learns."""

    def batch(self, data: Any, seed: int, step: int) -> Batch:
        """The batch of a step: a pure function of (seed, step). The data is what `load_data` chose for it."""

    def where(self, data: Any, seed: int, step: int, rows: Sequence[int]) -> list[str]:
        """Where these rows of a step's batch stand in the data, for a message."""

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weighted sum of losses, sum of weights, and summed metrics."""

    def validate(self, model: Decoder, data: Any, limit: int, rows: int) -> dict[str, float]:
        """Measures on held-out data, `val_loss` among them, of about `limit` tokens (0: all), `rows` at a time."""

    def prepare(self, step: int) -> None:
        """Called before a step's batch is made; what needs rollouts makes them here."""

    def state_dict(self) -> dict[str, Tensor]:
        """What must come back on resume; empty for most."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take it back."""


class Stateless:
    """The part of an objective whose batches follow from (seed, step) alone."""

    writes_text = True

    def prepare(self, step: int) -> None:
        """Nothing to prepare: the data is there already."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to take back."""
