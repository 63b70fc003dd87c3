"""Tokenized corpus: memory-mapped shards.

A shard is a header of 64 bytes (magic, version, bytes per token, token count, zeros; little-endian), then the
ids as uint16, or uint32 where the vocabulary has more than 65536 tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from minillama.errors import InputError

HEADER_BYTES = 64
_HEADER = struct.Struct("<8sIIQ40x")
_MAGIC = b"mllshard"
_VERSION = 1
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def damaged(path: Path, what: str, found: object = None, expected: object = None, at: str = "") -> InputError:
    """Error of a file in the cache; `at` is the location within it."""
    fix = f"delete {path.parent}; the next start writes it again"
    return InputError(what, where=f"{path}{at}", found=found, expected=expected, fix=fix)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest dtype of a vocabulary's ids."""
    return _DTYPES[2 if vocab_size <= 2**16 else 4]


@dataclass(frozen=True)
class Shard:
    """A token shard: its file, for messages, and the (N,) ids."""

    path: Path
    tokens: NDArray[Any]

    @classmethod
    def open(cls, path: str | Path) -> Shard:
        """Memory-map a shard, read-only.

        Raises:
            InputError: no such file, not a shard, a newer version, or a size that differs from the header's.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                actual, header = path.stat().st_size, file.read(HEADER_BYTES)
        except OSError as error:
            raise damaged(path, f"cannot read a data shard: {error.strerror}") from None
        if header[:8] != _MAGIC:
            raise damaged(path, "this is not a data shard", header[:8], _MAGIC)
        if len(header) < HEADER_BYTES:
            raise damaged(path, "this data shard is truncated", f"{actual} bytes", f"at least {HEADER_BYTES} bytes")
        _, version, width, count = _HEADER.unpack(header)
        if version != _VERSION or width not in _DTYPES:
            expected = f"version {_VERSION}, 2 or 4 bytes per token"
            found = f"version {version}, {width} bytes per token"
            raise damaged(path, "this data shard has an unknown format", found, expected)
        size = HEADER_BYTES + count * width
        if actual != size:
            what = f"this data shard is {'truncated' if actual < size else 'too long'}"
            expected = f"{size} bytes ({HEADER_BYTES} + {count} tokens of {width})"
            raise damaged(path, what, f"{actual} bytes", expected)
        if not count:  # an empty file cannot be mapped
            return cls(path, np.empty(0, _DTYPES[width]))
        return cls(path, np.memmap(path, _DTYPES[width], mode="r", offset=HEADER_BYTES, shape=(count,)))


class ShardWriter:
    """Shard writer: STEM-00000.bin, STEM-00001.bin, ... of a folder.

    A shard has a temporary name until it is complete. Without tokens nothing is written.

    The vocabulary's size decides the width of a token; every shard but the last has `shard_tokens`.
    """

    def __init__(self, folder: Path, stem: str, vocab_size: int, shard_tokens: int = 2**26) -> None:
        self.folder, self.stem, self.dtype, self.shard_tokens = folder, stem, token_dtype(vocab_size), shard_tokens
        self.tokens = 0
        self.paths: list[Path] = []
        self._file: BinaryIO | None = None
        self._count = 0

    def write(self, ids: Sequence[int] | NDArray[Any]) -> None:
        """Append token ids."""
        rest = np.asarray(ids, self.dtype)
        self.tokens += len(rest)
        while len(rest):
            if self._file is None:
                self._file = self._temporary().open("wb")
                self._file.write(bytes(HEADER_BYTES))
            part, rest = np.split(rest, [self.shard_tokens - self._count])
            self._file.write(part.tobytes())
            self._count += len(part)
            if self._count == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """Finish the current shard. `paths` then has all of them."""
        if self._file is None:
            return
        with self._file:
            self._file.seek(0)
            self._file.write(_HEADER.pack(_MAGIC, _VERSION, self.dtype.itemsize, self._count))
        path = self._temporary().with_suffix("")
        self._temporary().replace(path)
        self.paths.append(path)
        self._file, self._count = None, 0

    def _temporary(self) -> Path:
        return self.folder / f"{self.stem}-{len(self.paths):05d}.bin.tmp"
