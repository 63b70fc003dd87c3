"""Tensor data of a file, by ranges of bytes: read and not mapped, as cutting a mapped file short ends the process."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minillama.errors import InputError
from minillama.files import reading, regular
from minillama.formats.model_file import FLOATS
from minillama.formats.stored import Stored

TYPES = FLOATS | {"F64": torch.float64}
SMALL, LARGE, CHUNK = 2**20, 2**23, 2**25  # bytes


class Pages:
    """Memory of tensors, in huge pages where the system has them: faults of small ones cost twice the reading.

    Tensors of a megabyte and more leave the heap alone, as their pages go back to the system. Those below `LARGE`
    share chunks, since pieces of a huge page would be small pages; each gives its own pages back.
    """

    def __init__(self) -> None:
        self._lock, self._used = threading.Lock(), CHUNK  # no chunk yet

    def empty(self, size: int) -> Tensor:
        """Bytes (size,) of no particular value, uint8."""
        if size < SMALL:
            return torch.empty(size, dtype=torch.uint8)
        if size >= LARGE:
            return torch.frombuffer(_mapped(size), dtype=torch.uint8)
        with self._lock:
            if self._used + size > CHUNK:
                self._chunk, self._used = _mapped(CHUNK), 0
            chunk, start = self._chunk, self._used
            self._used += -(-size // 64) * 64  # cache lines
        part = memoryview(chunk)[start : start + size]
        weakref.finalize(part, _give_back, chunk, start, size).atexit = False
        return torch.frombuffer(part, dtype=torch.uint8)


def _mapped(size: int) -> mmap.mmap:
    """Memory from the system itself."""
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    pages = mmap.mmap(-1, size, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _give_back(chunk: mmap.mmap, start: int, size: int) -> None:
    """Return the pages of a tensor that is no more, but for those it shares with its neighbours."""
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and end > first:
        chunk.madvise(mmap.MADV_DONTNEED, first, end - first)


@dataclass(frozen=True)
class DataFile:
    """File of tensors, which stays as it was.

    Attributes:
        path: the file.
        version: of its content: device, inode, size, time of the last change.
        pages: for the tensors that are read.
    """

    path: Path
    version: tuple[int, ...]
    pages: Pages = field(default_factory=Pages, repr=False, compare=False)

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
        data = self.pages.empty(size)
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


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
