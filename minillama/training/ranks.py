"""Process group of a run: rank, world size, and sums over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import distributed, nn


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model; alone unless `torch.distributed` is initialized.

    Args:
        rank: 0..world-1.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """That of the default process group."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all ranks, in float64, of values that each rank has by the same names."""
        if self.world == 1:
            return dict(values)
        found = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
        distributed.all_reduce(found)
        return dict(zip(sorted(values), found.tolist(), strict=True))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums of the gradients of replicated parameters: every rank divided its loss by the totals of all."""
        for parameter in parameters if self.world > 1 else ():
            if parameter.requires_grad:  # a rank whose examples do not reach it takes part with zeros
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                distributed.all_reduce(gradient)
                parameter.grad = gradient
