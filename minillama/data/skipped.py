"""Accounting of the files and documents that are not read: errors of documents, remarks on files, the report."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from minillama.errors import InputError, printable

_LOCATIONS, _PRINTED = 1000, 5  # of skipped documents; names of files by each reason
_REASONS, _NAMES, _WIDTH = 8, 3, 60  # on the terminal: reasons, names of each, characters of a name


@dataclass(frozen=True)
class Remark:
    """What is said of files beside their documents: in the plural, to be counted, or once; or why one is left out."""

    text: str
    is_counted: bool = True
    file: str = ""
    """The file that is left out, relative to its folder."""


class BadText(InputError):
    """Error of an invalid document. `reason` is the error class, for counting."""

    def __init__(
        self,
        reason: str,
        what: str,
        *,
        where: object,
        found: object = None,
        expected: object = None,
        fix: str = 'correct it, or skip such documents with data.on_error = "skip"',
    ) -> None:
        super().__init__(what, where=where, found=found, expected=expected, fix=fix)
        self.reason = reason


@dataclass
class Skipped:
    """Skipped documents: counts by reason, and the locations of the first 1,000, as file:line.

    `notes` has the number of documents that were changed, by the change, and of files, by what is said of them;
    `files` the files that were left out, by the reason: their number, and the first 1,000 names, relative to their
    folder and escaped.
    """

    counts: dict[str, int] = field(default_factory=dict)
    locations: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    files: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, bad: BadText) -> None:
        """Add a document."""
        self.merge(Skipped({bad.reason: 1}, [str(bad.where)]))

    def note(self, change: str, count: int = 1) -> None:
        """Count a document that was changed, or a file; 0 notes something else."""
        self.notes[change] = self.notes.get(change, 0) + count

    def remark(self, remark: Remark) -> None:
        """Take over a remark."""
        if remark.file:
            self._leave_out(remark.text, 1, [printable(remark.file)])
        else:
            self.note(remark.text, int(remark.is_counted))

    def merge(self, other: Skipped) -> None:
        """Add another's counts and names."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        for change, count in other.notes.items():
            self.note(change, count)
        for reason, (count, names) in other.files.items():
            self._leave_out(reason, count, names)
        self.locations = (self.locations + other.locations)[:_LOCATIONS]

    def _leave_out(self, reason: str, count: int, names: list[str]) -> None:
        known, listed = self.files.get(reason, (0, []))
        listed.extend(names[: _LOCATIONS - len(listed)])
        self.files[reason] = known + count, listed

    @property
    def total(self) -> int:
        """Number of skipped documents."""
        return sum(self.counts.values())

    def record(self) -> dict[str, Any]:
        """Everything that was left out, for the record of a run; empty where all was read."""
        parts = {"files": self.files, "documents": self.counts, "locations": self.locations}
        return {name: part for name, part in parts.items() if part}

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        words = f"{self.total} {'document' if self.total == 1 else 'documents'} left out: {reasons}"
        left_out = [f"{words} ({', '.join(self.locations[:_PRINTED])})"] if self.total else []
        counted = {_singular(change) if count == 1 else change: count for change, count in self.notes.items()}
        notes = [f"{count} {words}" if count else words for words, count in counted.items()]
        return "; ".join([*left_out, *notes, *([f"files left out: {self._named()}"] if self.files else [])])

    def _named(self) -> str:
        """The first files that were left out, the most frequent reason first."""
        listed = sorted(self.files.items(), key=lambda item: -item[1][0])
        shown = [f"{count:,} {_cut(reason)} ({_first(names, count)})" for reason, (count, names) in listed[:_REASONS]]
        rest = sum(count for _, (count, _) in listed[_REASONS:])
        return ", ".join([*shown, *([f"{rest:,} for other reasons"] if rest else [])])


def _first(names: list[str], count: int) -> str:
    more = count - _NAMES
    return ", ".join(map(_cut, names[:_NAMES])) + (f" and {more:,} more" if more > 0 else "")


def _cut(name: str) -> str:
    """A stranger's name on the terminal: escaped, without the middle of a long one."""
    name = printable(name)
    return name if len(name) <= _WIDTH else f"{name[: _WIDTH // 2]}...{name[-_WIDTH // 2 :]}"


def _singular(words: str) -> str:
    return re.sub(r"\b(document|file|conversation)s\b", r"\1", words, count=1)
