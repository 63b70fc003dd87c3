"""Document readers: text, JSON and JSONL; errors by file and line."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

from minillama.data.archives import DamagedError, open_file, plain_name
from minillama.data.encoding import NotTextError, recognized
from minillama.data.skipped import BadText, Remark
from minillama.errors import InputError
from minillama.files import bound, check_size, reading

RECORDS = (".jsonl", ".json", ".ndjson")
"""Suffixes of files with records, in any case."""
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
DOCUMENT, LINE = 2**32, 2**28
"""Bytes of a text file and of a line or an array of JSON at most; they are in memory as a whole."""
FIELDS = ("text", "content", "body", "article", "paragraphs", "document", "story", "passage", "raw_content")
"""Fields that usually hold a record's text."""
_LABELS = ("id", "doc_id", "uuid", "url", "title", "name", "author", "date", "lang", "language")

NO_FIELD, NO_OBJECT = "no text field", "is not a JSON object"
_CHUNK = 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A text, without byte order mark, newlines as LF; and its file, with the line in JSONL."""

    text: str
    where: str


@dataclass(frozen=True)
class Record:
    """An object of a JSONL file, with file and line."""

    value: dict[str, Any]
    where: str


def read_file(path: Path, key: str, folder: Path | None = None) -> Iterator[Document | BadText | Remark]:
    """Documents of a file: one per record of JSON or JSONL, otherwise one; .gz, .zst and .bz2 are decompressed.

    Args:
        path: the file; its suffix is the format.
        key: text field of a record; empty: found in the first one that has one, see `text_field`.
        folder: where it was found, unless it was named: of a folder, empty files and JSON without texts are left out.

    Yields:
        Documents, an error in place of each invalid one, and remarks.

    Raises:
        InputError: the file cannot be opened, or needs a package that is not installed.
    """
    if format_of(path) in TABLES:
        what, fix = "a table is not read", "convert it to JSONL, or rename it to .txt to read it as text"
        raise InputError(what, where=path, expected=f"{', '.join(RECORDS)} or text", fix=fix)
    name = "" if folder is None else str(path.relative_to(folder))
    if not holds_records(path):
        for one in read_items(path, lambda stream: [_document(_content(stream, path), path)]):
            yield Remark("empty", file=name) if name and isinstance(one, Document) and not one.text else one
        return
    given = key
    for item in read_records(path, bound(LINE)):
        if isinstance(item, Record) and not key:
            key = text_field(item.value)
        is_other = isinstance(item, Record) or (isinstance(item, BadText) and item.what.endswith(NO_OBJECT))
        if is_other and name and not (key or is_jsonl(path)):
            yield Remark(f"{format_of(path)} without a field of text", file=name)
            return
        yield from_record(item.value, key, item.where) if isinstance(item, Record) else item
    if key not in (given, "text"):
        yield Remark(f"files of records with their texts in {key!r}")


def read_lines(path: Path, key: str = "") -> Iterator[Document | BadText | Remark]:
    """Documents of a text file, one per line; .gz, .zst and .bz2 are decompressed."""
    limit = bound(LINE)

    def lines(stream: io.BufferedIOBase) -> Iterator[Document | BadText]:
        for number, data in enumerate(_bounded(stream, limit), 1):
            where = f"{path}:{number}"
            text = _decode(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data, path, number)
            bad = text if isinstance(text, BadText) else too_long(where, limit) if len(data) > limit else None
            yield bad or Document(str(text).removesuffix("\n").removesuffix("\r"), where)

    return read_items(path, lines)


def read_records(path: Path, limit: int | None = None) -> Iterator[Record | BadText | Remark]:
    """Objects of a JSONL file, or of a JSON file with an array; .gz, .zst and .bz2 decompressed; see `read_file`.

    The content says which of the two it is. JSONL is read line by line, an array as a whole.

    Args:
        limit: bytes of the longest line, or array; longer ones are errors. Memory is bounded by it.
    """
    return read_items(path, lambda stream: _json_records(_bounded(stream, limit) if limit else stream, path, limit))


def is_jsonl(path: Path) -> bool:
    """Whether a file has the suffix of JSONL: one JSON object per line."""
    return format_of(path) == ".jsonl"


def holds_records(path: Path) -> bool:
    """Whether a file has the suffix of JSON or JSONL."""
    return format_of(path) in RECORDS


def format_of(path: Path) -> str:
    """Suffix of a file, that before .gz, .zst or .bz2, in small letters."""
    return Path(plain_name(path.name)).suffix.lower()


def text_field(record: dict[str, Any]) -> str:
    """Field of a record for its text: one of `FIELDS`, with a text or without a value, or the only text; else empty."""
    texts = [name for name, value in record.items() if _text(value) is not None]
    vacant = [name for name in FIELDS if name in record and not record[name]]
    only = texts if len(texts) == 1 and texts[0] not in _LABELS else []
    return next(iter([*(name for name in FIELDS if name in texts), *vacant, *only]), "")


def _text(value: object) -> str | None:
    """A string, or the lines of a list of strings."""
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def from_record(record: dict[str, Any], key: str, where: str) -> Document | BadText:
    """Document of a JSON object or a data set row: its field `key`, a string or a list of lines."""
    text = _text(record.get(key))
    if text is not None:
        return clean(text, where)
    found = f"fields {', '.join(map(repr, record)) or 'none'}"
    if not key:
        what, expected = "no field of this record is known to hold its text", " or ".join(FIELDS[:3])
        return BadText(NO_FIELD, what, where=where, found=found, expected=expected, fix="name it with --data.field")
    what = f"field {key!r} is not a string" if key in record else f"there is no field {key!r}"
    found = repr(record[key])[:80] if key in record else found
    fix = 'name another with --data.field, or skip such records with data.on_error = "skip"'
    return BadText(NO_FIELD, what, where=where, found=found, expected=f"a string in {key!r}", fix=fix)


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


def read_items(
    path: Path, read: Callable[[io.BufferedIOBase], Iterable[T]], recognizes: bool = True
) -> Iterator[T | BadText | Remark]:
    """Items of `read` on an open file, and an error for the rest of a damaged archive.

    Args:
        read: from its bytes to items.
        recognizes: give it those in UTF-8, where another encoding is recognized, and a remark.
    """
    with reading(path):
        name = ""
        try:
            with open_file(path) as opened:
                name, stream = recognized(opened) if recognizes else ("", opened)
                if name:
                    yield Remark(f"files in {name.upper()}")
                yield from read(stream)
        except NotTextError as error:
            fix = "give its text as a file, of a PDF that of pdftotext; or leave it out"
            yield BadText("other kind", "this file is not text", where=path, found=error, fix=fix)
        except UnicodeDecodeError as error:
            yield BadText(f"invalid {name}", f"this text is not {name}", where=path, found=error.reason)
        except DamagedError as error:
            yield BadText("damaged archive", "this compressed file is damaged or truncated", where=path, found=error)


def _object(value: object, where: str, what: str) -> Record | BadText:
    if isinstance(value, dict):
        return Record(value, where)
    return BadText("malformed JSON", f"{what} {NO_OBJECT}", where=where, found=type(value).__name__)


def _content(stream: io.BufferedIOBase, path: Path) -> bytearray:
    """The content of a file that is one document."""
    data = bytearray()
    while chunk := stream.read(_CHUNK):  # not all at once, which would allocate the bound
        data += chunk
        check_size(len(data), DOCUMENT, path)
    return data


def _document(data: bytearray, path: Path) -> Document | BadText:
    text = _decode(data.removeprefix(codecs.BOM_UTF8), path)
    return text if isinstance(text, BadText) else Document(text.replace("\r\n", "\n"), str(path))


def _bounded(stream: io.BufferedIOBase, limit: int) -> Iterator[bytes]:
    """Lines; of one that is longer than `limit`, limit + 1 bytes."""
    while line := stream.readline(limit + 1):
        yield line
        while len(line) > limit and not line.endswith(b"\n"):
            line = stream.readline(limit + 1)


def too_long(where: object, limit: int) -> BadText:
    """Error of a document that is longer than `limit` bytes."""
    return BadText("too long", "this document is too long", where=where, found=f"over {limit:,} bytes")


def _json_records(stream: Iterable[bytes], path: Path, limit: int | None = None) -> Iterator[Record | BadText]:
    lines = iter(stream)
    head, first = _until_text(lines)
    after, second = _until_text(lines) if first.startswith(b"[") else ((), b"")
    text = chain(head, after, lines)
    if not _is_whole(first, is_last=not second, is_jsonl=is_jsonl(path)):
        yield from _json_lines(text, path, limit)
        return
    data = bytearray()
    for line in text:
        data += line
        if limit and len(data) > limit:
            yield too_long(path, limit)
            return
    whole = _decode(bytes(data).removeprefix(codecs.BOM_UTF8), path)
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


def _until_text(lines: Iterator[bytes]) -> tuple[Iterable[bytes], bytes]:
    """Lines up to the next that is not blank, and that one without spaces; b"" where there is none."""
    blank = 0
    for line in lines:
        if text := line.removeprefix(codecs.BOM_UTF8).strip():
            return chain(repeat(b"\n", blank), [line]), text
        blank += 1
    return repeat(b"\n", blank), b""


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
    while (place := next(blank.finditer(text, place)).end()) < len(text) and text[place] != end:
        number += 1
        where = f"{path}, record {number}"
        try:
            value, place = decode(text, place)
        except (ValueError, RecursionError) as error:
            yield BadText("malformed JSON", "the file is not JSON from here on", where=where, found=error)
            return
        yield _object(value, where, "this record")
    if text[place:] != end:
        what, where = "the file's array does not end with it", f"{path}, behind record {number}"
        yield BadText("malformed JSON", what, where=where, found=repr(text[place:][:60]), expected="]")


def _json_lines(stream: Iterable[bytes], path: Path, limit: int | None) -> Iterator[Record | BadText]:
    for number, data in enumerate(stream, 1):
        if limit and len(data) > limit:
            yield too_long(f"{path}:{number}", limit)
            continue
        line = _decode(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data, path, number)
        if isinstance(line, BadText):
            yield line
        elif line := line.strip():
            yield _record(line, f"{path}:{number}")


def _record(line: str, where: str) -> Record | BadText:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        found = f"{error}: {line[:60]!r}"
        return BadText("malformed JSON", "this line is not JSON", where=where, found=found)
    return _object(value, where, "this line")


def _decode(data: bytes | bytearray, path: Path, line: int | None = None) -> str | BadText:
    """UTF-8 decoding without NUL; `line` is the line number of the data, None counts it in them."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        start, reason, what = error.start, "invalid UTF-8", "this text is not UTF-8"
        found = f"byte 0x{data[start]:02x}, {error.reason}"
        fix = 'convert it (iconv -f ENCODING -t UTF-8), correct it, or skip such documents with data.on_error = "skip"'
    else:
        start, reason, what = data.find(0), "NUL", "there is a NUL byte in this text"
        found, fix = f"at byte {start}", 'correct it, or skip such documents with data.on_error = "skip"'
        if start < 0:
            return text
    return BadText(reason, what, where=f"{path}:{line or data.count(10, 0, start) + 1}", found=found, fix=fix)
