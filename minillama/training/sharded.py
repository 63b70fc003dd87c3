"""Sharded tensors (DTensor): the own part, the whole, and where the part stands in the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minillama.runs.parts import Stored


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, whose class is slow to import."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; another as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, for which all its processes must ask; another as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def bit_sum(tensor: Tensor) -> int:
    """Sum of the bits, read as integers, of this process's part: the same in whatever order."""
    own = local(tensor.detach()).flatten()
    return int(own.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[own.element_size()]).sum())


def gathered(tensors: Mapping[str, Tensor], keeps: bool) -> dict[str, Tensor]:
    """Copies on the CPU, one tensor gathered at a time.

    Args:
        tensors: by names that all processes have in the same order.
        keeps: whether this process keeps them; else nothing is returned.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach()) if keeps or is_sharded(tensor) else tensor
        if keeps:
            found[name] = full.to("cpu", copy=True)
    return found


def part(tensor: Tensor) -> tuple[slice, ...]:
    """Where this process's part of a sharded tensor stands in the whole.

    Axes of the mesh divide from the last to the first, as tensor parallelism comes before sharding, and each into parts
    of equal size, of which the last ones may be smaller or empty, as `torch.chunk` has them.
    """
    given: Any = tensor
    bounds = [[0, size] for size in tensor.shape]
    for axis in reversed(range(given.device_mesh.ndim)):
        dim = getattr(given.placements[axis], "dim", None)
        if dim is not None:
            start, stop = bounds[dim]
            size = -(-(stop - start) // given.device_mesh.size(axis))
            start = min(start + given.device_mesh.get_local_rank(axis) * size, stop)
            bounds[dim] = [start, min(start + size, stop)]
    return tuple(slice(*bound) for bound in bounds)


@torch.no_grad()
def fill(target: Tensor, full: Tensor | Stored) -> None:
    """Give a sharded tensor the values of a whole one, perhaps on the disk."""
    local(target).copy_(full[part(target)])


@torch.no_grad()
def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module, whose parameters may be sharded, the values of whole tensors of the same names."""
    if not any(map(is_sharded, module.parameters())):
        module.load_state_dict(tensors)
        return
    own = module.state_dict()
    if own.keys() != tensors.keys():
        raise ValueError(f"tensors of other names: {sorted(own.keys() ^ tensors.keys())}")
    for name, tensor in own.items():
        if is_sharded(tensor):
            fill(tensor, tensors[name])
        else:
            tensor.copy_(tensors[name])


class Streamed(Mapping[str, Tensor]):
    """Whole tensors that are written one at a time, in the place of sharded ones, which keep their parts.

    Args:
        targets: by name. The one that was asked for last is kept when the next is asked for, or by `keep`.
    """

    def __init__(self, targets: Mapping[str, Tensor]) -> None:
        self.targets = targets
        self._open: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        self.keep()
        self._open = name, torch.empty(self.targets[name].shape)
        return self._open[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def keep(self) -> None:
        """Keep the part of the last one."""
        if self._open is not None:
            name, full = self._open
            fill(self.targets[name], full)
        self._open = None
