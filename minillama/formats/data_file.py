"""Tensor data of a file, by ranges of bytes: read and not mapped, as cutting a mapped file short ends the process."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minillama.errors import InputError
from minillama.files import reading, regular
from minillama.formats.model_file import FLOATS
from minillama.formats.stored import Stored

TYPES = FLOATS | {"F64": torch.float64}


@dataclass(frozen=True)
class DataFile:
    """File of tensors, which stays as it was.

    Attributes:
        path: the file.
        version: of its content: device, inode, size, time of the last change.
    """

    path: Path
    version: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> DataFile:
        """The file as it is now, before its header is read.

        Raises:
            InputError: it cannot be read.
        """
        with reading(path):
            return cls(path, _version(os.stat(path)))

    def read(self, stored: Stored) -> Tensor:
        """Bytes (size,) of a tensor, uint8.

        Raises:
            InputError: the file has changed since.
        """
        size, filled = stored.size, 0
        data = _memory(size)
        rest = data.numpy().data
        with reading(self.path), open(self.path, "rb", buffering=0, opener=regular) as file:
            file.seek(stored.start)
            while filled < size and (count := file.readinto(rest[filled:])):
                filled += count
            self.check(os.fstat(file.fileno()), filled == size)
        return data

    def check(self, status: os.stat_result | None = None, is_whole: bool = True) -> None:
        """Refuse a file that has changed since.

        Raises:
            InputError: it has.
        """
        with reading(self.path):
            version = _version(status or os.stat(self.path))
        if version != self.version or not is_whole:
            fix = "start again when nothing writes to it"
            raise InputError("the file was changed while it was read", where=self.path, fix=fix)

    def floats(self, stored: Stored) -> Tensor:
        """Tensor of a type of `TYPES`, as `read`."""
        return self.read(stored).view(TYPES[stored.dtype]).view(stored.shape)


def _memory(size: int) -> Tensor:
    """Bytes (size,), many of them in pages that go back to the system with the tensor, and not to the heap."""
    if size < 2**20:
        return torch.empty(size, dtype=torch.uint8)
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    return torch.frombuffer(mmap.mmap(-1, size, **flags), dtype=torch.uint8)


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
