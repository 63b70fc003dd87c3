"""Document readers: UTF-8 text, JSONL, gzip, zstd; errors by file and line."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from minillama.errors import InputError

RECORDS = (".jsonl", ".json", ".ndjson")
"""Suffixes of files with records."""

_LOCATIONS = 5
T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A document.

    Args:
        text: without byte order mark, newlines as LF.
        where: the file, with the line in JSONL.
    """

    text: str
    where: str


@dataclass(frozen=True)
class Record:
    """An object of a JSONL file.

    Args:
        value: the object.
        where: file and line.
    """

    value: dict[str, Any]
    where: str


class BadText(InputError):
    """Error of an invalid document. `reason` is the error class, for counting."""

    def __init__(self, reason: str, what: str, *, where: object, found: object = None, expected: object = None) -> None:
        fix = 'mend it, or leave such text out with data.on_error = "skip"'
        super().__init__(what, where=where, found=found, expected=expected, fix=fix)
        self.reason = reason


@dataclass
class Skipped:
    """Skipped documents.

    Args:
        counts: by reason.
        places: locations of the first few, as file:line.
        notes: number of documents that were changed, by the change.
    """

    counts: dict[str, int] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def add(self, bad: BadText) -> None:
        """Add a document."""
        self.counts[bad.reason] = self.counts.get(bad.reason, 0) + 1
        if len(self.places) < _LOCATIONS:
            self.places.append(str(bad.where))

    def note(self, change: str) -> None:
        """Count a document that was changed."""
        self.notes[change] = self.notes.get(change, 0) + 1

    def merge(self, other: Skipped) -> None:
        """Add another's counts."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        for change, count in other.notes.items():
            self.notes[change] = self.notes.get(change, 0) + count
        self.places = (self.places + other.places)[:_LOCATIONS]

    @property
    def total(self) -> int:
        """Number of skipped documents."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        left_out = [f"{self.total} documents left out: {reasons} ({', '.join(self.places)})"] if self.total else []
        return "; ".join(left_out + [f"{count} {change}" for change, count in self.notes.items()])


def need_extra(package: str, what: str) -> InputError:
    """Error of a missing package."""
    return InputError(f"{what} needs the package {package}", fix="pip install 'minillama[data]'")


def read_file(path: Path, key: str) -> Iterator[Document | BadText]:
    """Documents of a file: one per line of JSONL, otherwise one; .gz and .zst are decompressed.

    Args:
        path: the file; its suffix is the format.
        key: text field of a JSONL object.

    Yields:
        Documents, and an error in place of each invalid one.

    Raises:
        InputError: the file cannot be opened, or needs a package that is not installed.
    """
    if is_jsonl(path):
        for item in read_records(path):
            yield item if isinstance(item, BadText) else from_record(item.value, key, item.where)
        return
    yield from _guarded(path, lambda stream: [_text(stream.read(), str(path))])


def read_records(path: Path) -> Iterator[Record | BadText]:
    """Objects of a JSONL file, or of a JSON file with an array; .gz and .zst decompressed; see `read_file`.

    The content says which of the two it is. JSONL is read line by line, an array as a whole.
    """
    yield from _guarded(path, lambda stream: _json_records(stream, path))


def is_jsonl(path: Path) -> bool:
    """Whether a file has the suffix of JSONL: one JSON object per line."""
    return _format(path) == ".jsonl"


def holds_records(path: Path) -> bool:
    """Whether a file has the suffix of JSON or JSONL."""
    return _format(path) in RECORDS


def _format(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix


def _guarded(path: Path, read: Callable[[io.BufferedIOBase], Iterable[T]]) -> Iterator[T | BadText]:
    """Items of `read` on an open file, and an error for the rest of a damaged archive."""
    try:
        with _open(path) as stream:
            yield from read(stream)
    except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedError) as error:
        yield BadText("damaged archive", "this compressed file is damaged or truncated", where=path, found=error)
    except OSError as error:
        raise InputError(f"cannot read this file: {error.strerror}", where=path) from None


def clean(text: str, where: str) -> Document | BadText:
    """Document of a decoded text: newlines normalized, NUL and lone surrogates refused."""
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
    """Document of a JSON object or a data set row: its field `key`."""
    if not isinstance(record, dict):
        return _no_object(record, where)
    value = record.get(key)
    if isinstance(value, str):
        return clean(value, where)
    what = f"field {key!r} is not a string" if key in record else f"there is no field {key!r}"
    found = repr(value)[:80] if key in record else f"fields {', '.join(map(repr, record)) or 'none'}"
    return BadText("no text field", what, where=where, found=found, expected=f"a string in {key!r} (source field)")


def _no_object(value: object, where: str, what: str = "this line") -> BadText:
    return BadText("malformed JSON", f"{what} is not a JSON object", where=where, found=type(value).__name__)


def _text(data: bytes, path: str) -> Document | BadText:
    data = data.removeprefix(codecs.BOM_UTF8)
    text = _decode(data, path, None)
    return text if isinstance(text, BadText) else Document(text.replace("\r\n", "\n"), path)


def _json_records(stream: Iterable[bytes], path: Path) -> Iterator[Record | BadText]:
    lines = iter(stream)
    head = list(_until_text(lines))
    first = head[-1].removeprefix(codecs.BOM_UTF8).strip() if head else b""
    after = list(_until_text(lines)) if first.startswith(b"[") else []
    text = chain(head, after, lines)
    if not _is_whole(first, is_last=not b"".join(after).strip(), is_jsonl=is_jsonl(path)):
        yield from _json_lines(text, path)
        return
    whole = _decode(b"".join(text).removeprefix(codecs.BOM_UTF8), str(path), None)
    if isinstance(whole, BadText):
        yield whole
    else:
        yield from _json_values(whole, path)


def _is_whole(first: bytes, is_last: bool, is_jsonl: bool) -> bool:
    """Whether the first line begins a value of several lines, or is an array that is all of the file."""
    if first.startswith(b"[") and is_last:
        return True
    if is_jsonl and first != b"[" and not first.startswith(b"[{"):
        return False  # a damaged line
    return first[:1] in (b"[", b"{") and not _is_json(first)


def _until_text(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Lines up to the next that is not blank."""
    for line in lines:
        yield line
        if line.removeprefix(codecs.BOM_UTF8).strip():
            return


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_values(text: str, path: Path) -> Iterator[Record | BadText]:
    """Objects of an array, or one behind the other."""
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    text = text.strip()
    place, end = (1, "]") if text.startswith("[") else (0, "")
    number = 0
    while (place := _behind(blank, text, place)) < len(text) and text[place] != end:
        number += 1
        where = f"{path}, record {number}"
        try:
            value, place = decode(text, place)
        except (ValueError, RecursionError) as error:
            yield BadText("malformed JSON", "the file is not JSON from here on", where=where, found=error)
            return
        yield Record(value, where) if isinstance(value, dict) else _no_object(value, where, "this record")
    if text[place:] != end:
        what, where = "the file's array does not end with it", f"{path}, behind record {number}"
        yield BadText("malformed JSON", what, where=where, found=repr(text[place:][:60]), expected="]")


def _behind(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place


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
    """UTF-8 decoding without NUL; `line` is the line number of the data, None counts it in them."""
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
    """Invalid or truncated zstd stream."""


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
    """Multi-frame zstd reader. The library's own does not detect a truncated file."""

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
