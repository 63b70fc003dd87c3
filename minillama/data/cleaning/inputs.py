"""Inputs of a cleaning: crawls, pages, texts and records as documents, each file read within bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from minillama.config.loader import config_names
from minillama.data.archives import plain_name
from minillama.data.builtin import BUILTIN
from minillama.data.cleaning.charset import page_text
from minillama.data.cleaning.document import Draft
from minillama.data.cleaning.warc import read_warc
from minillama.data.reading import (
    NO_FIELD,
    Document,
    Record,
    from_record,
    holds_records,
    read_items,
    read_records,
    text_field,
    too_long,
)
from minillama.data.skipped import BadText, Remark
from minillama.data.sources import SUFFIXES, Source, find_files, read_source
from minillama.errors import InputError
from minillama.files import LargeInputError

LIMIT = 50 * 2**20
"""Bytes of the longest document; longer ones are counted and left out."""

CRAWLS, PAGES = (".warc", ".wet", ".warc.txt"), (".html", ".htm", ".xhtml")


@dataclass(frozen=True)
class Input:
    """Source of a cleaning.

    Args:
        path: what a training source can be, and .warc, .wet and .html files.
        tag: its name in the output; made of `path` unless given.
        field: text field of records, a string or a list of strings; found in each file unless given.
        suffixes: files of a folder that are read; all of the known kinds unless given.
    """

    named_by: ClassVar[str] = "this source"
    """Where `field` was set."""

    path: str
    tag: str = ""
    field: str = ""
    suffixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w\-]*", self.tag):
            raise InputError("a tag has letters, digits and hyphens", where="tag", found=self.tag)

    @property
    def label(self) -> str:
        """Name in the output: the tag, or what the path ends in."""
        stem = Path(self.path.partition("*")[0].rstrip("/") or "source").name.partition(".")[0]
        return self.tag or re.sub(r"[^\w\-]+", "-", stem).strip("-") or "source"

    @property
    def setting(self) -> str:
        """The text field that is set, and where, for messages; empty: none is."""
        return f"field = {self.field!r} of {self.named_by}" if self.field else ""

    def files(self) -> list[Path]:
        """Its files in order; none if it is built in or on the hub.

        Raises:
            InputError: there are none.
        """
        if self.path in BUILTIN or self.path.startswith("hf:"):
            return []
        try:
            return find_files(self.path, self.suffixes or (*SUFFIXES, *CRAWLS, *PAGES))
        except InputError as error:
            if "://" in self.path or Path(self.path).exists():
                raise error.at("sources") from None
            close = get_close_matches(self.path, (*BUILTIN, *config_names("data")), n=1)
            fix = f"did you mean {close[0]!r}?" if close else None
            expected = f"a path, a glob, {', '.join(BUILTIN)}, or hf:NAME; or a pipeline: a .toml file, "
            expected += ", ".join(config_names("data"))
            raise InputError(error.what, where="sources", found=self.path, expected=expected, fix=fix) from None

    def documents(self, path: Path | None) -> Iterator[Draft | BadText]:
        """Documents of one of its files, or of a source without files; an error for each that cannot be read."""
        try:
            yield from self._documents(path)
        except LargeInputError as error:  # a bomb: what came before it counts
            yield BadText("too large", error.what, where=error.where, found=error.found, expected=error.expected)

    def _documents(self, path: Path | None) -> Iterator[Draft | BadText]:
        if path is None:
            found: Iterator[Any] = read_source(Source(name=self.path, field=self.field))
        elif (plain := plain_name(path.name).lower()).endswith(CRAWLS):
            found = read_warc(path, LIMIT)
        elif holds_records(path):
            found = read_records(path, LIMIT)
        else:
            found = _text(path)
        key = self.field
        for item in found:
            if isinstance(item, Remark):
                continue
            if isinstance(item, BadText):
                yield item
            elif isinstance(item, Record):
                key = key or text_field(item.value)
                yield self._draft(item, key)
            elif isinstance(item, Document):
                kind = "html" if path and plain.endswith(PAGES) else ""
                yield Draft(item.text, where=item.where, kind=kind, source=self.label)
            else:
                kind = "html" if item.is_html else ""
                yield Draft(item.text, where=item.where, kind=kind, source=self.label, url=item.url)

    def _draft(self, record: Record, key: str) -> Draft | BadText:
        document = from_record(record.value, key, record.where)
        if isinstance(document, BadText):
            is_named = self.field and document.reason == NO_FIELD
            found = f"{self.setting}; {document.found}" if is_named else document.found
            return BadText(document.reason, document.what, where=document.where, found=found)
        rest = {name: value for name, value in record.value.items() if name != key}
        nested: dict[str, Any] = next(
            (rest[name] for name in ("metadata", "meta") if isinstance(rest.get(name), dict)), {}
        )
        url = next((str(table["url"]) for table in (rest, nested) if isinstance(table.get("url"), str)), "")
        return Draft(document.text, where=document.where, source=self.label, url=url, fields=rest)


class CommandLineInput(Input):
    """Source of the command line, read as the first one of the pipeline."""

    named_by = "the pipeline's first source (sources.0.field)"


def _text(path: Path) -> Iterator[Document | BadText | Remark]:
    """A file as one document, of any charset."""

    def read(stream: Any) -> list[Document | BadText]:
        data = stream.read(LIMIT + 1)
        text = too_long(path, LIMIT) if len(data) > LIMIT else page_text(data, str(path))
        return [text if isinstance(text, BadText) else Document(text, str(path))]

    return read_items(path, read, recognizes=False)
