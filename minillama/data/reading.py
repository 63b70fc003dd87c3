"""Bytes to documents: UTF-8 text, JSONL, gzip, zstd; and what is wrong with them, by file and line."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from minillama.errors import InputError

__all__ = [
    "BadText",
    "Document",
    "Record",
    "Skipped",
    "clean",
    "from_record",
    "is_jsonl",
    "need_extra",
    "read_file",
    "read_records",
]

_PLACES = 5
T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A text that belongs together.

    Args:
        text: without byte order mark, lines ended by a newline alone.
        where: the file, with the line in JSONL.
    """

    text: str
    where: str


@dataclass(frozen=True)
class Record:
    """An object of a JSONL file.

    Args:
        value: the object that the line holds.
        where: file and line.
    """

    value: dict[str, Any]
    where: str


class BadText(InputError):
    """A document that cannot be used. `reason` names the class of fault, for counting."""

    def __init__(self, reason: str, what: str, *, where: object, found: object = None, expected: object = None) -> None:
        fix = 'mend it, or leave such text out with data.on_error = "skip"'
        super().__init__(what, where=where, found=found, expected=expected, fix=fix)
        self.reason = reason


@dataclass
class Skipped:
    """Documents that were left out.

    Args:
        counts: how many, by reason.
        places: the first few of them, as file:line.
    """

    counts: dict[str, int] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)

    def add(self, bad: BadText) -> None:
        """Count one."""
        self.counts[bad.reason] = self.counts.get(bad.reason, 0) + 1
        if len(self.places) < _PLACES:
            self.places.append(str(bad.where))

    def merge(self, other: Skipped) -> None:
        """Count all of another's."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        self.places = (self.places + other.places)[:_PLACES]

    @property
    def total(self) -> int:
        """How many in all."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        return f"{self.total} documents left out: {reasons} ({', '.join(self.places)})" if self.total else ""


def need_extra(package: str, what: str) -> InputError:
    """The error of a package that is not installed."""
    return InputError(f"{what} needs the package {package}", fix="pip install 'minillama[data]'")


def read_file(path: Path, key: str) -> Iterator[Document | BadText]:
    """The documents of a file: its lines if it is JSONL, the whole of it otherwise; .gz and .zst are unpacked.

    Args:
        path: the file; its name says what it holds.
        key: the member of a JSONL object that is the text.

    Yields:
        Documents, and in the place of one that cannot be used the error that says why.

    Raises:
        InputError: the file cannot be opened, or needs a package that is not installed.
    """
    if is_jsonl(path):
        for item in read_records(path):
            yield item if isinstance(item, BadText) else from_record(item.value, key, item.where)
        return
    yield from _guarded(path, lambda stream: [_text(stream.read(), str(path))])


def read_records(path: Path) -> Iterator[Record | BadText]:
    """The objects of a JSONL file, .gz and .zst unpacked; see `read_file`."""
    yield from _guarded(path, lambda stream: _json_lines(stream, path))


def is_jsonl(path: Path) -> bool:
    """Whether a file's name says that it holds a JSON object a line."""
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix == ".jsonl"


def _guarded(path: Path, read: Callable[[io.BufferedIOBase], Iterable[T]]) -> Iterator[T | BadText]:
    """What `read` gives of an open file, and an error in the place of what a damaged archive withholds."""
    try:
        with _open(path) as stream:
            yield from read(stream)
    except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedError) as error:
        yield BadText("damaged archive", "this compressed file is damaged or cut short", where=path, found=error)
    except OSError as error:
        raise InputError(f"cannot read this file: {error.strerror}", where=path) from None


def clean(text: str, where: str) -> Document | BadText:
    """A document of a decoded text: newlines made equal, NUL and lone surrogates refused."""
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        return BadText("NUL", "there is a NUL character in this text", where=where, found=f"in line {line} of the text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"a lone surrogate, {text[error.start]!a}"
        return BadText("invalid Unicode", "this text is not valid Unicode", where=where, found=found)
    return Document(text.replace("\r\n", "\n"), where)


def from_record(record: object, key: str, where: str) -> Document | BadText:
    """The document of a JSON object or a row of a data set: its member `key`."""
    if not isinstance(record, dict):
        return _no_object(record, where)
    value = record.get(key)
    if isinstance(value, str):
        return clean(value, where)
    what = f"field {key!r} is not a string" if key in record else f"there is no field {key!r}"
    found = repr(value)[:80] if key in record else f"fields {', '.join(map(repr, record)) or 'none'}"
    return BadText("no text field", what, where=where, found=found, expected=f"a string in {key!r} (source field)")


def _no_object(value: object, where: str) -> BadText:
    what, found = "this line is not a JSON object", type(value).__name__
    return BadText("malformed JSON", what, where=where, found=found)


def _text(data: bytes, path: str) -> Document | BadText:
    data = data.removeprefix(codecs.BOM_UTF8)
    text = _decode(data, path, None)
    return text if isinstance(text, BadText) else Document(text.replace("\r\n", "\n"), path)


def _json_lines(stream: Iterable[bytes], path: Path) -> Iterator[Record | BadText]:
    for number, raw in enumerate(stream, 1):
        where = f"{path}:{number}"
        line = _decode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, str(path), number)
        if isinstance(line, BadText):
            yield line
        elif line := line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BadText("malformed JSON", "this line is not JSON", where=where, found=f"{error}: {line[:60]!r}")
            else:
                yield Record(value, where) if isinstance(value, dict) else _no_object(value, where)


def _decode(data: bytes, path: str, line: int | None) -> str | BadText:
    """UTF-8 without NUL; `line` is where the data stand, None counts the line in them."""
    nul = data.find(0)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        where = f"{path}:{line or data.count(10, 0, error.start) + 1}"
        found = f"byte 0x{data[error.start]:02x}, {error.reason}"
        return BadText("invalid UTF-8", "this text is not UTF-8", where=where, found=found)
    if nul >= 0:
        where = f"{path}:{line or data.count(10, 0, nul) + 1}"
        return BadText("NUL", "there is a NUL byte in this text", where=where, found=f"at byte {nul}")
    return text


class _DamagedError(Exception):
    """A zstd stream that ends early or is none."""


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix != ".zst":
        return path.open("rb")
    try:
        import zstandard
    except ImportError:
        raise need_extra("zstandard", "a .zst file") from None
    return io.BufferedReader(_Zstd(path.open("rb"), zstandard), 2**20)


class _Zstd(io.RawIOBase):
    """A zstd file, frame after frame. The library's own reader takes a file that is cut short for a whole one."""

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file, self._zstandard = file, zstandard
        self._frame: Any = None
        self._raw = self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._raw = self._raw or self._file.read(2**20)
            if not self._raw:
                if self._frame is not None:
                    raise _DamagedError("the last zstd frame is not complete")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self) -> None:
        self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._ready = self._frame.decompress(self._raw)
        except self._zstandard.ZstdError as error:
            raise _DamagedError(error) from None
        self._raw = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
