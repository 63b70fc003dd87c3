"""Tensor data of a file, by ranges of bytes: read and not mapped, as cutting a mapped file short ends the process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minillama.errors import InputError
from minillama.files import reading, regular
from minillama.formats.stored import Stored

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        size = stored.size
        data, filled = torch.empty(size, dtype=torch.uint8), 0
        rest = data.numpy().data
        with reading(self.path), open(self.path, "rb", buffering=0, opener=regular) as file:
            file.seek(stored.start)
            while filled < size and (count := file.readinto(rest[filled:])):
                filled += count
            version = _version(os.fstat(file.fileno()))
        if filled < size or version != self.version:
            fix = "start again when nothing writes to it"
            raise InputError("the file was changed while it was read", where=self.path, fix=fix)
        return data

    def floats(self, stored: Stored) -> Tensor:
        """Tensor of a type of `TYPES`, as `read`."""
        return self.read(stored).view(TYPES[stored.dtype]).view(stored.shape)


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
