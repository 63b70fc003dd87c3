"""Settings of a run's processes: data, sharded and tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from minillama.errors import InputError


class Sizes(NamedTuple):
    """Axes of the mesh of processes."""

    data: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def processes(self) -> int:
        """Their number."""
        return self.data * self.shard * self.tensor

    @property
    def readers(self) -> int:
        """Shares of a batch."""
        return self.data * self.shard

    @property
    def parts(self) -> int:
        """Processes that a model is divided over."""
        return self.shard * self.tensor

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self._asdict().items())


def meshes(processes: int, machine: int) -> list[Sizes]:
    """Meshes from the least division of a model to the most.

    Sharding comes first, and tensor parallelism, within a machine of so many processes, beyond it.
    """
    divisors = [size for size in range(1, processes + 1) if processes % size == 0]
    sharded = [Sizes(processes // size, size) for size in divisors]
    return sharded + [Sizes(1, processes // size, size) for size in divisors[1:] if machine % size == 0]


@dataclass(frozen=True)
class ParallelConfig:
    """Processes that train one model, as torchrun starts them: data x shard x tensor of them."""

    data: int = field(default=0, metadata={"min": 0})
    """Replicas, or groups of shard x tensor processes, each with its share of the batch; 0: as many as there are."""
    shard: int = field(default=1, metadata={"min": 1})
    """Processes that parameters, gradients and optimizer state are divided by (FSDP); each has its share of the batch
    too."""
    tensor: int = field(default=1, metadata={"min": 1})
    """Processes that divide the matrices of a layer and work on the same rows (tensor parallelism)."""
    auto: bool = False
    """Choose all three by memory: as little division as fits."""
    timeout: float = field(default=600.0, metadata={"above": 0})
    """Seconds that processes wait for one another before all are ended; most steps that hang are found sooner."""
    pipeline: int = field(default=1, metadata={"min": 1})
    """Not supported: 1."""
    context: int = field(default=1, metadata={"min": 1})
    """Not supported: 1."""

    def __post_init__(self) -> None:
        reasons = {
            "pipeline": "sharding and tensor parallelism divide a model of every preset without idle stages",
            "context": "torch 2.13 has no sharding strategy for the CPU's attention, where all of this is tested",
        }
        for name, reason in reasons.items():
            if (found := getattr(self, name)) != 1:
                what, fix = f"{name} parallelism is not supported: {reason}", "divide by shard, tensor or data"
                raise InputError(what, where=f"parallel.{name}", found=found, expected=1, fix=fix)
        if self.auto and (self.data, self.shard, self.tensor) != (0, 1, 1):
            what, found = "auto chooses data, shard and tensor", f"{self.data}, {self.shard}, {self.tensor}"
            raise InputError(what, where="parallel.auto", found=found, fix="leave them out, or auto")
