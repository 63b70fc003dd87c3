"""Duplicate removal: documents, paragraphs over the whole corpus (CCNet), lines that repeat over a host's pages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from minillama.data.cleaning.ccnet import normalized_for_duplicates
from minillama.data.cleaning.document import Draft, Removal
from minillama.data.cleaning.grouping import CorpusStep, Groups, Rows, Verdicts, groups, hash64

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class _Hashed(CorpusStep):
    """Step over equal hashes: `hashed` gives those of a document, `chosen` the rows of a group that go."""

    def hashed(self, draft: Draft) -> Iterator[tuple[int, str]]:
        raise NotImplementedError

    def chosen(self, group: Groups) -> NDArray[np.bool_]:
        return np.arange(len(group.first)) > group.first

    def collect(self, rows: Rows, draft: Draft) -> None:
        for detail, text in self.hashed(draft):
            rows.add_row(hash64(text), draft.index, detail)

    def decide(self, collected: Sequence[Path], verdicts: Verdicts) -> dict[str, Any]:
        removed = 0
        for group in groups(collected):
            gone = self.chosen(group)
            first = group.documents[group.first[gone]]
            verdicts.add(group.documents[gone], first, group.sizes[gone], group.details[gone])
            removed += int(gone.sum())
        return {"removed": removed}


@dataclass(frozen=True)
class ExactDuplicates(_Hashed):
    """Equal documents, but for white space: the first is kept, by the order of sources, files and records."""

    name: Literal["exact-duplicates"] = "exact-duplicates"

    def hashed(self, draft: Draft) -> Iterator[tuple[int, str]]:
        yield 0, _SPACE.sub(" ", draft.text).strip()

    def settle(self, draft: Draft, found: NDArray[Any], names: Sequence[str]) -> Removal | None:
        return self.like_another(draft, found, names, "duplicate", "copies")


@dataclass(frozen=True)
class _Lines(_Hashed):
    """Removal of single lines; the document goes with the last of them."""

    min_lines: int = 1
    min_characters: int = 0
    """Lines and characters that must be left."""

    def settle(self, draft: Draft, found: NDArray[Any], names: Sequence[str]) -> Removal | None:
        gone = set(found["detail"].tolist())
        lines = [line for number, line in enumerate(draft.text.split("\n")) if number not in gone]
        draft.text = "\n".join(lines)
        left = sum(bool(line.strip()) for line in lines)
        return self.judge(draft, {"removed_lines": len(gone), "lines": left, "characters": len(draft.text)})


@dataclass(frozen=True)
class DuplicateParagraphs(_Lines):
    """CCNet's: of lines that are equal once normalized the first is kept, over the whole corpus (arXiv 1911.00359)."""

    name: Literal["duplicate-paragraphs"] = "duplicate-paragraphs"

    def hashed(self, draft: Draft) -> Iterator[tuple[int, str]]:
        normal = enumerate(map(normalized_for_duplicates, draft.text.split("\n")))
        return ((number, line) for number, line in normal if line)


@dataclass(frozen=True)
class HostLines(_Lines):
    """Lines that stand on many pages of one host, such as menus: all of them go."""

    name: Literal["host-lines"] = "host-lines"
    pages: int = field(default=10, metadata={"min": 2})
    """Pages of a host on which a line repeats."""

    def hashed(self, draft: Draft) -> Iterator[tuple[int, str]]:
        host, lines = host_of(draft.url), enumerate(draft.text.split("\n"))
        return ((number, f"{host}\n{line.strip()}") for number, line in lines if host and line.strip())

    def chosen(self, group: Groups) -> NDArray[np.bool_]:
        row = np.arange(len(group.first))
        is_new = (row == group.first) | (np.diff(group.documents, prepend=group.documents[:1]) != 0)
        return np.bincount(group.first, is_new, len(row))[group.first] >= self.pages


def host_of(url: str) -> str:
    """Host of an address, without www."""
    try:
        return (urlsplit(url).hostname or "").removeprefix("www.")
    except ValueError:
        return ""
