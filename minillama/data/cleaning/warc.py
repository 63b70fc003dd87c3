"""WARC and WET reader: records of a crawl, also from damaged files (ISO 28500).

A truncated gzip member, a false length or a line that is no header costs the record that it stands in: reading goes on
at the next line `WARC/1`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from minillama.data.archives import DamagedError, open_file
from minillama.data.cleaning.charset import page_text
from minillama.data.skipped import BadText
from minillama.files import reading, regular

_CHUNK = 2**18
_GZIP = b"\x1f\x8b\x08"
_PAGES = ("text/html", "application/xhtml+xml", "text/plain")
_MARK = b"\nWARC/1."


@dataclass(frozen=True)
class Response:
    """Page of a crawl: its text or HTML, its address, and where it was found."""

    text: str
    is_html: bool
    url: str
    where: str


def read_warc(path: Path, limit: int) -> Iterator[Response | BadText]:
    """HTML and plain-text responses, and WET's conversions, of a file.

    Args:
        path: the file, of gzip members, .zst, .bz2 or plain.
        limit: bytes of the longest record.

    Yields:
        Pages, and an error in place of each record that is damaged, too long, or of no charset.
    """
    is_packed = path.suffix.lower() in (".zst", ".bz2")
    with reading(path), open_file(path) if is_packed else open(path, "rb", opener=regular) as file:
        blocks = _Blocks(file, is_packed)
        for number, (headers, body, problem) in enumerate(_records(blocks, limit), 1):
            where = f"{path}, record {number}"
            if problem:
                yield BadText(problem, "this record of the crawl is damaged or too long", where=where, found=problem)
            elif (page := _response(headers, body, where, limit)) is not None:
                yield page
        if blocks.damaged:
            what = "this compressed file is damaged or truncated"
            yield BadText("damaged archive", what, where=path, found=f"{blocks.damaged} members")


class _Blocks:
    """Bytes of a file, decompressed: lines, blocks of a length, and a way back."""

    def __init__(self, file: BufferedReader, is_packed: bool) -> None:
        self.damaged = 0
        self._ready, self._at = b"", 0
        is_gzip = not is_packed and file.peek(3)[:3] == _GZIP
        self._more = self._unzipped(file) if is_gzip else self._plain(file)

    def _plain(self, file: BufferedReader) -> Iterator[bytes]:
        """Bytes as they are, or unpacked up to the first damage."""
        try:
            yield from iter(lambda: file.read1(_CHUNK), b"")  # whose bytes before a damage are not lost
        except DamagedError:
            self.damaged += 1

    def _unzipped(self, file: BufferedReader) -> Iterator[bytes]:
        data, member = b"", None
        while data := data or file.read(_CHUNK):
            if member is None:  # at a member, or in search of the next
                start = data.find(_GZIP)
                rest = b"" if start >= 0 else file.read(_CHUNK)
                if start < 0 and not rest:
                    return
                data, member = (data[start:], zlib.decompressobj(31)) if start >= 0 else (data[-2:] + rest, None)
                continue
            try:
                made = member.decompress(data, _CHUNK)
            except zlib.error:
                self.damaged += 1
                data, member = data[1:], None
                continue
            yield made
            data = member.unconsumed_tail or member.unused_data
            member = None if member.eof else member
        self.damaged += member is not None

    def _fill(self) -> bool:
        more = next(self._more, None)
        if more is not None:
            self._ready, self._at = self._ready[self._at :] + more, 0
        return more is not None

    def line(self) -> bytes:
        """The next line, in parts of at most 64 KiB; empty at the end."""
        while (end := self._ready.find(b"\n", self._at)) < 0 and len(self._ready) - self._at < 2**16 and self._fill():
            pass
        stop = min(end + 1, self._at + 2**16) if end >= 0 else min(len(self._ready), self._at + 2**16)
        line, self._at = self._ready[self._at : stop], stop
        return line

    def block(self, length: int) -> bytes:
        """So many bytes, or what is left."""
        parts, missing = [self._ready[self._at : self._at + length]], length
        self._at += len(parts[0])
        missing -= len(parts[0])
        while missing and self._fill():
            parts.append(self._ready[:missing])
            self._at = len(parts[-1])
            missing -= self._at
        return b"".join(parts)

    def back(self, data: bytes) -> None:
        """Give bytes back, to be read again."""
        self._ready, self._at = data + self._ready[self._at :], 0


def _records(blocks: _Blocks, limit: int) -> Iterator[tuple[Mapping[str, str], bytes, str]]:
    """Headers, body and problem of each record."""
    while line := blocks.line():
        if not line.strip():
            continue
        if not line.startswith(b"WARC/1."):
            while (line := blocks.line()) and not line.startswith(b"WARC/1."):
                pass
            blocks.back(line)
            yield {}, b"", "no WARC header"
            continue
        headers = _headers(blocks)
        stated = headers.get("content-length", "")
        is_stated = stated.isdecimal() and len(stated) < 19
        length = int(stated) if is_stated else 0
        body = blocks.block(min(length, limit))
        problem = "" if length == len(body) else "too long" if len(body) == limit else "truncated"
        problem = problem if is_stated else "no length"
        after, inside = b"" if problem else blocks.line(), body.find(_MARK)
        if problem or after.strip() or inside >= 0:  # a false length: the next record is inside, or further on
            blocks.back(body[inside + 1 :] + after if inside >= 0 else after)
            body = body[:inside] if inside >= 0 else body
            problem = "false length" if inside >= 0 or not problem else problem
            while (rest := blocks.line()) and not rest.startswith(b"WARC/1."):
                pass
            blocks.back(rest)
            if not line.endswith(b"\r\n"):  # a file whose line ends were converted: each length counts what is gone
                problem = ""
        yield headers, body, problem


def _headers(blocks: _Blocks) -> dict[str, str]:
    found = {}
    for _ in range(1000):
        line = blocks.line().strip()
        if not line:
            break
        name, _, value = line.decode("utf-8", "replace").partition(":")
        found[name.lower()] = value.strip()
    return found


def _response(headers: Mapping[str, str], body: bytes, where: str, limit: int) -> Response | BadText | None:
    """Page of a record; None if it is a request, an image, an error page."""
    url = headers.get("warc-target-uri", "").strip("<>")
    if headers.get("warc-type") == "conversion":
        page = page_text(body, where, "utf-8")
        return page if isinstance(page, BadText) else Response(page, False, url, where)
    if headers.get("warc-type") != "response" or not body.startswith(b"HTTP/"):
        return None
    head, _, body = body.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    http = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    kind, _, options = http.get("content-type", "").lower().partition(";")
    if not status.partition(" ")[2].startswith("2") or kind.strip() not in _PAGES:
        return None
    if "chunked" in http.get("transfer-encoding", "").lower():
        body = _unchunked(body)
    if http.get("content-encoding", "").lower() in ("gzip", "x-gzip", "deflate") and not body.lstrip().startswith(b"<"):
        try:
            stream = zlib.decompressobj(47)
            body = stream.decompress(body, limit)
        except zlib.error as error:
            return BadText("damaged page", "this page cannot be decompressed", where=where, found=error)
        if stream.unconsumed_tail:
            return BadText("too long", "this page is too long", where=where, found=f"over {limit} bytes")
    page = page_text(body, where, options.partition("charset=")[2].strip("\"' "))
    return page if isinstance(page, BadText) else Response(page, "plain" not in kind, url, where)


def _unchunked(body: bytes) -> bytes:
    """Body of HTTP's chunked transfer coding; as it is where the crawler decoded it already."""
    parts, at = [], 0
    while (end := body.find(b"\r\n", at)) >= 0:
        try:
            size = int(body[at:end].partition(b";")[0], 16)
        except ValueError:
            break
        if size <= 0:
            break
        parts.append(body[end + 2 : end + 2 + size])
        at = end + size + 4
    return b"".join(parts) or body
