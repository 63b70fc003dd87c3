"""Files that may be compressed by gzip, zstd or bzip2, and what they unpack to at most."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minillama.errors import optional_import
from minillama.files import check_size, regular

PACKED = (".gz", ".zst", ".bz2")
"""Suffixes of compressed files, in any case."""
RATIO, SMALL = 100, 2**26
"""An archive unpacks to so many times its size at most, or to so many bytes; web text to five times."""
_CHUNK = 2**20
_ZSTD = 2**13  # bytes of it at once, as four of them unpack to 2^17 at most


def plain_name(name: str) -> str:
    """A file's name without the suffix of its compression."""
    plain, suffix = os.path.splitext(name)
    return plain if suffix.lower() in PACKED else name


def open_file(path: Path) -> io.BufferedReader:
    """The content of a regular file, decompressed.

    Raises:
        OSError: it cannot be opened, or is a pipe or a device.
        InputError: later, while it is read: it unpacks to more than `RATIO` times its size, and more than `SMALL`.
        DamagedError: later.
    """
    file = open(path, "rb", opener=regular)  # noqa: SIM115 - closed with what is returned, or at once
    suffix = path.suffix.lower()
    if suffix not in PACKED:
        return file
    packed = os.fstat(file.fileno()).st_size
    if suffix != ".zst":
        archive = gzip.GzipFile(fileobj=file) if suffix == ".gz" else bz2.BZ2File(file)
        chunks = _chunks(archive)
    else:
        chunks = _zstd_frames(file, optional_import("zstandard", "a .zst file", "data"))
    return io.BufferedReader(Chunks(_bounded(chunks, path, max(SMALL, RATIO * packed)), file), _CHUNK)


class DamagedError(ValueError):
    """Invalid or truncated stream."""


def _chunks(archive: gzip.GzipFile | bz2.BZ2File) -> Iterator[bytes]:
    try:
        while chunk := archive.read(_CHUNK):
            yield chunk
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedError(error) from None


def _zstd_frames(file: BinaryIO, zstandard: Any) -> Iterator[bytes]:
    """Decompressed chunks of all frames. The library's own reader does not detect a truncated file."""
    frame, data = None, b""
    while data := data or file.read(_ZSTD):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            yield frame.decompress(data)
        except zstandard.ZstdError as error:
            raise DamagedError(error) from None
        data = frame.unused_data if frame.eof else b""
        frame = None if frame.eof else frame
    if frame is not None:
        raise DamagedError("the last zstd frame is not complete")


def _bounded(chunks: Iterator[bytes], path: Path, most: int) -> Iterator[bytes]:
    count = 0
    for chunk in chunks:
        count += len(chunk)
        check_size(count, most, path, "unpacked bytes")
        yield chunk


class Chunks(io.RawIOBase):
    """Binary file of an iterator's chunks; `file` is closed with it."""

    def __init__(self, chunks: Iterator[bytes], file: BinaryIO | None = None) -> None:
        self._chunks, self._file, self._ready = chunks, file, b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes, as many as fit."""
        while not self._ready:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._ready = chunk
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        """Close the file behind it, too."""
        if self._file is not None:
            self._file.close()
        super().close()
