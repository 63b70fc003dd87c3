"""Optimizer state in one file or in a file per process, each with its parts of the tensors.

`optimizer.safetensors` has whole tensors, `optimizer-00001-of-00002.safetensors` parts, whose place and whose tensors'
shapes its metadata has as JSON: {NAME: {"shape": [...], "start": [...]}}. A tensor that it does not mention is whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minillama.errors import InputError

PATTERN = "optimizer*.safetensors"


def file_name(index: int, count: int) -> str:
    """Name of the file of one process among those that have parts."""
    return "optimizer.safetensors" if count == 1 else f"optimizer-{index + 1:05}-of-{count:05}.safetensors"


@dataclass(frozen=True)
class Place:
    """Where a part stands in its tensor.

    Args:
        at: indices.
        shape: of the whole.
    """

    at: tuple[slice, ...]
    shape: tuple[int, ...]


def write(path: Path, tensors: Mapping[str, Tensor], places: Mapping[str, Place]) -> None:
    """Write a file of whole tensors, and of parts, whose places are given."""
    known = {name: {"shape": place.shape, "start": [s.start for s in place.at]} for name, place in places.items()}
    metadata = {"parts": json.dumps(known)} if known else None
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


@dataclass
class Stored:
    """Tensor on the disk, in one or more files.

    Args:
        name: in the files.
        shape: of the whole.
        parts: file and the first index of the part there.
    """

    name: str
    shape: tuple[int, ...]
    parts: list[tuple[Path, tuple[int, ...]]] = field(default_factory=list)

    def whole(self) -> Tensor:
        """All of it."""
        return self[tuple(slice(0, size) for size in self.shape)]

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor:
        """The part at these indices.

        Raises:
            InputError: a damaged file, or one that is missing.
        """
        found, count = None, 0
        for path, start in self.parts:
            with opened(path) as file:
                stored = file.get_slice(self.name)
                sizes = stored.get_shape()
                both = [
                    slice(max(a.start, b), max(a.start, b, min(a.stop, b + size)))
                    for a, b, size in zip(place, start, sizes, strict=True)
                ]
                if any(part.start == part.stop for part in both):
                    continue
                if not both:
                    return file.get_tensor(self.name)
                piece = stored[tuple(slice(p.start - b, p.stop - b) for p, b in zip(both, start, strict=True))]
            if found is None:
                found = piece.new_empty([a.stop - a.start for a in place])
            found[tuple(slice(p.start - a.start, p.stop - a.start) for p, a in zip(both, place, strict=True))] = piece
            count += piece.numel()
        size = math.prod(a.stop - a.start for a in place)
        if found is None and size == 0:
            return torch.empty([a.stop - a.start for a in place])
        if found is None or count < size:
            what, fix = "parts of the optimizer state are missing", "bring back the files of all processes"
            raise InputError(what, where=self.parts[0][0].parent, found=self.name, fix=fix)
        return found


def read(paths: Sequence[Path]) -> dict[str, Stored]:
    """Tensors of the files, by name; nothing is read but the headers.

    Raises:
        InputError: a damaged file.
    """
    tensors: dict[str, Stored] = {}
    for path in paths:
        with opened(path) as file:
            known = json.loads((file.metadata() or {}).get("parts", "{}"))
            for name in file.keys():  # noqa: SIM118 - no dictionary
                shape = file.get_slice(name).get_shape()
                entry = known.get(name, {"shape": shape, "start": [0] * len(shape)})
                stored = tensors.setdefault(name, Stored(name, tuple(entry["shape"])))
                place = tuple(entry["start"])
                if place not in [start for _, start in stored.parts]:  # replicas have the same
                    stored.parts.append((path, place))
    return tensors


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file in a block.

    Raises:
        InputError: it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError("a file of the checkpoint is damaged", where=path, found=error) from error
