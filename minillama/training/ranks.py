"""Process group of a run: rank, world size, sums over the ranks, and what all of them must agree on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, distributed, nn

from minillama.errors import InputError
from minillama.training.sharded import bit_sum, local

T = TypeVar("T")
BUCKET = 2**23  # gradients per reduction
BLOCKS = count()  # that the first process ran before the others, which all meet in one order


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model; alone unless `torch.distributed` is initialized.

    Args:
        rank: 0..world-1, of the share of a batch that it reads; ranks of one tensor-parallel group have the same.
        world: number of shares.
        index: 0..processes-1.
        processes: number of processes.
        parts: processes that one model is divided over, the first ones.
        readers: group of the processes that have one share each; the default group unless given.
        replicas: group of those that have the same parameters or the same shards; the default group unless given.
    """

    rank: int = 0
    world: int = 1
    index: int = 0
    processes: int = 1
    parts: int = 1
    readers: Any = None
    replicas: Any = None
    entered: ClassVar[Ranks | None] = None

    @classmethod
    def current(cls) -> Ranks:
        """The entered one, or that of the default process group."""
        if cls.entered is not None:
            return cls.entered
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        rank, world = distributed.get_rank(), distributed.get_world_size()
        return cls(rank, world, rank, world)

    @contextmanager
    def enter(self) -> Iterator[Ranks]:
        """The current one in a block."""
        before, Ranks.entered = Ranks.entered, self
        try:
            yield self
        finally:
            Ranks.entered = before

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.index == 0

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the shares, in float64, of values that each rank has by the same names."""
        if self.world == 1:
            return dict(values)
        found = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
        distributed.all_reduce(found, group=self.readers)
        return dict(zip(sorted(values), found.tolist(), strict=True))

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums of the gradients of replicated parameters: every rank divided its loss by the totals of all."""
        if self.processes == 1 or distributed.get_world_size(self.replicas) == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # a rank whose examples do not reach it takes part with zeros
                parameter.grad = torch.zeros_like(parameter)
            gradient = local(parameter.grad)
            if bucket and (gradient.dtype != bucket[0].dtype or sum(map(Tensor.numel, bucket)) >= BUCKET):
                self._sum(bucket)
                bucket = []
            bucket.append(gradient)
        self._sum(bucket)

    def _sum(self, gradients: list[Tensor]) -> None:
        """Sums in place, by one reduction."""
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat, group=self.replicas)
        for gradient, summed in zip(gradients, flat.split([*map(Tensor.numel, gradients)]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def most(self, value: float) -> float:
        """The largest value of all processes."""
        if self.processes == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return found.item()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """A block that the first process runs before all others, which wait for it however long it takes."""
        name = f"leader first {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {next(BLOCKS)}"
        if self.processes > 1 and not self.leads:
            distributed.distributed_c10d._get_default_store().wait([name], timedelta(days=7))
        yield
        if self.processes > 1 and self.leads:
            distributed.distributed_c10d._get_default_store().set(name, "")

    def part(self, count: int, size: int) -> tuple[slice, int]:
        """Own rows of a pass over `count` of all shares, at most `size` each, and how often they count.

        A process without rows reads the first one, which does not count: sharded weights are gathered by all at once.
        """
        start = self.rank * size
        return (slice(start, start + size), 1) if start < count else (slice(0, 1), 0)

    def collect(self, value: T) -> list[T]:
        """The values of all processes, by index."""
        found: list[Any] = [value] * self.processes
        if self.processes > 1:
            distributed.all_gather_object(found, value)
        return found

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Sum over the shares, in place."""
        if self.world > 1:
            distributed.all_reduce(tensor, group=self.readers)
        return tensor

    def leaders(self, value: T) -> T:
        """The first process's value, for all: a path, a list of numbers."""
        if self.processes == 1:
            return value
        found: list[Any] = [value]
        distributed.broadcast_object_list(found, 0, device=torch.device("cpu"))
        return found[0]


def check_same_weights(models: Mapping[str, nn.Module], ranks: Ranks) -> None:
    """Refuse replicas that begin with other weights, read from files that are not the same on all machines."""
    if ranks.processes == ranks.parts:
        return
    own = {f"{name}, {key}": bit_sum(t) for name, model in models.items() for key, t in model.state_dict().items()}
    sums = ranks.collect(own)
    for index, found in enumerate(sums):
        first = index % ranks.parts  # which has the same part of the model
        for where in [name for name in found if found[name] != sums[first].get(name)]:
            what, fix = "the processes begin with other weights", "give all machines the same files"
            raise InputError(
                what, where=where, found=f"those of process {index}", expected=f"of process {first}", fix=fix
            )
