"""Duplicate removal: documents, paragraphs over the whole corpus (CCNet), lines that repeat over a host's pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from minillama.data.cleaning.ccnet import normalized_for_duplicates
from minillama.data.cleaning.document import Draft, Removal
from minillama.data.cleaning.grouping import Collector, CorpusStep, Rows, Verdicts, groups, hash64, name_of

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class ExactDuplicates(CorpusStep):
    """Equal documents, but for white space: the first is kept, by the order of sources, files and records."""

    name: Literal["exact-duplicates"] = "exact-duplicates"

    def collector(self) -> Collector:
        """Hashes of documents."""
        return _Documents()

    def decide(self, collected: Sequence[Path], verdicts: Verdicts) -> dict[str, Any]:
        """Verdicts on all but the first of a group."""
        removed = 0
        for group in groups(collected):
            later = np.arange(len(group.first)) > group.first
            verdicts.add(group.documents[later], group.documents[group.first[later]], group.sizes[later])
            removed += int(later.sum())
        return {"duplicates": removed}

    def settle(self, draft: Draft, found: NDArray[Any], names: Sequence[str]) -> Removal | None:
        """Remove a duplicate."""
        if not len(found):
            return self.judge(draft, {})
        self.judge(draft, {"duplicate_of": name_of(int(found["other"][0]), names), "copies": float(found["value"][0])})
        return Removal("duplicate", str(draft.measured[self.name]["duplicate_of"]))


class _Documents(Rows):
    def add(self, draft: Draft) -> None:
        self.add_row(hash64(_SPACE.sub(" ", draft.text).strip()), draft.index)


@dataclass(frozen=True)
class _Lines(CorpusStep):
    """Removal of single lines; the document goes with the last of them."""

    min_lines: int = 1
    min_characters: int = 0
    """Lines and characters that must be left."""

    def settle(self, draft: Draft, found: NDArray[Any], names: Sequence[str]) -> Removal | None:
        """Remove the lines."""
        gone = set(found["detail"].tolist())
        lines = draft.text.split("\n")
        draft.text = "\n".join(line for number, line in enumerate(lines) if number not in gone)
        left = sum(bool(line.strip()) for line in draft.text.split("\n"))
        return self.judge(draft, {"removed_lines": len(gone), "lines": left, "characters": len(draft.text)})


@dataclass(frozen=True)
class DuplicateParagraphs(_Lines):
    """CCNet's: of lines that are equal once normalized the first is kept, over the whole corpus (arXiv 1911.00359)."""

    name: Literal["duplicate-paragraphs"] = "duplicate-paragraphs"

    def collector(self) -> Collector:
        """Hashes of normalized lines."""
        return _Paragraphs()

    def decide(self, collected: Sequence[Path], verdicts: Verdicts) -> dict[str, Any]:
        """Verdicts on all but the first line of a group."""
        removed = 0
        for group in groups(collected):
            later = np.arange(len(group.first)) > group.first
            chosen = group.documents[later]
            verdicts.add(chosen, group.documents[group.first[later]], group.sizes[later], group.details[later])
            removed += len(chosen)
        return {"duplicate lines": removed}


class _Paragraphs(Rows):
    def add(self, draft: Draft) -> None:
        for number, line in enumerate(draft.text.split("\n")):
            if normal := normalized_for_duplicates(line):
                self.add_row(hash64(normal), draft.index, number)


@dataclass(frozen=True)
class HostLines(_Lines):
    """Lines that stand on many pages of one host, such as menus: all of them go."""

    name: Literal["host-lines"] = "host-lines"
    pages: int = field(default=10, metadata={"min": 2})
    """Pages of a host on which a line repeats."""

    def collector(self) -> Collector:
        """Hashes of host and line."""
        return _HostLines()

    def decide(self, collected: Sequence[Path], verdicts: Verdicts) -> dict[str, Any]:
        """Verdicts on the lines of groups that span enough documents."""
        removed = 0
        for group in groups(collected):
            if not len(group.first):
                continue
            is_first = np.arange(len(group.first)) == group.first
            is_new = is_first | (np.diff(group.documents, prepend=group.documents[:1]) != 0)
            starts = np.flatnonzero(is_first)
            pages = np.repeat(np.add.reduceat(is_new.astype(np.int64), starts), group.sizes[starts])
            often = pages >= self.pages
            chosen = group.documents[often]
            verdicts.add(chosen, group.documents[group.first[often]], pages[often], group.details[often])
            removed += len(chosen)
        return {"repeated lines": removed}


class _HostLines(Rows):
    def add(self, draft: Draft) -> None:
        host = host_of(draft.url)
        for number, line in enumerate(draft.text.split("\n") if host else ()):
            if line.strip():
                self.add_row(hash64(f"{host}\n{line.strip()}"), draft.index, number)


def host_of(url: str) -> str:
    """Host of an address, without www."""
    try:
        return (urlsplit(url).hostname or "").removeprefix("www.")
    except ValueError:
        return ""
