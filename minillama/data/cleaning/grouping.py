"""Grouping by 64-bit keys over all parts, out of core: the shuffle under every kind of duplicate.

Each part's rows lie sorted on disk, 16 bytes each; groups are read by ranges of keys, so that memory is bounded by
`ROWS` whatever the corpus, and the result does not depend on the number of workers.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minillama.data.cleaning.document import Draft, Removal, Step
from minillama.files import replace_file

ROWS = 2**22
U64 = NDArray[np.uint64]
VERDICT = np.dtype([("document", "<u4"), ("detail", "<u4"), ("other", "<u8"), ("value", "<f8")])


@dataclass(frozen=True)
class CorpusStep(Step):
    """Step that looks at all documents at once: collect in each part, decide once, settle each document."""

    def collect(self, rows: Rows, draft: Draft) -> None:
        """Take what is needed from a document."""
        raise NotImplementedError

    def decide(self, collected: Sequence[Path], verdicts: Verdicts) -> dict[str, Any]:
        """Write verdicts from what all parts collected; figures for the report."""
        raise NotImplementedError

    def settle(self, draft: Draft, found: NDArray[Any], names: Sequence[str]) -> Removal | None:
        """Apply the verdicts of a document; `names` are those of the parts."""
        raise NotImplementedError

    def like_another(
        self, draft: Draft, found: NDArray[Any], names: Sequence[str], reason: str, measure: str
    ) -> Removal | None:
        """Remove a document that has a verdict: it is like another one, by the verdict's value."""
        if not len(found):
            return self.judge(draft, {})
        part, index = divmod(int(found["other"][0]), 2**32)
        other = f"{names[part]}-{index}"
        self.judge(draft, {"like": other, measure: float(found["value"][0])})
        return Removal(reason, other, getattr(self, measure, ""))


def hash64(text: str) -> int:
    """First 8 bytes of SHA-1, little-endian: CCNet's hash of a paragraph."""
    return int.from_bytes(sha1(text.encode(errors="replace")).digest()[:8], "little")


class Rows:
    """Accumulator of rows (key, document, detail) of a part, and of what else its step needs."""

    def __init__(self) -> None:
        self._keys, self._places = array("Q"), array("Q")
        self._tables: dict[str, list[Any]] = {}

    def add_row(self, key: int, index: int, detail: int = 0) -> None:
        """Add a row of document `index` of this part."""
        self._keys.append(key)
        self._places.append(index << 32 | detail)

    def add_to(self, table: str, entry: Any) -> None:
        """Add an entry, of the type and shape of the others, to a table beside the rows, a suffix such as `.sizes`."""
        self._tables.setdefault(table, []).append(entry)

    def save(self, path: Path) -> None:
        """Write the tables, and the (2, N) keys and places, sorted by key."""
        for suffix, entries in self._tables.items():
            save_array(path.with_suffix(suffix), np.array(entries))
        rows = np.array([self._keys, self._places], np.uint64).reshape(2, -1)
        save_array(path, rows[:, np.argsort(rows[0], kind="stable")])


def save_array(path: Path, values: NDArray[Any]) -> None:
    """Write an array atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)

    replace_file(path, write)


def table(path: Path, suffix: str) -> NDArray[Any]:
    """Table beside a part's rows; without entries (0, 1)."""
    path = path.with_suffix(suffix)
    return np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else np.empty((0, 1), np.uint32)


class Groups(NamedTuple):
    """Rows of whole groups, sorted by key; in a group by document, then detail.

    Args:
        documents: (N,) part << 32 | index.
        details: (N,) the detail.
        first: (N,) row at which the group of each row begins.
        sizes: (N,) rows of its group.
    """

    documents: U64
    details: U64
    first: NDArray[np.int64]
    sizes: NDArray[np.int64]


def groups(collected: Sequence[Path], rows: int = ROWS) -> Iterator[Groups]:
    """Groups of at least two rows with equal keys, in chunks of about `rows` rows."""
    parts = [np.load(path, mmap_mode="r", allow_pickle=False) for path in collected]
    count = sum(part.shape[1] for part in parts)
    chunks = -(-count // rows)
    for chunk in range(chunks):
        low, high = (min(i * 2**64 // chunks, 2**64 - 1) for i in (chunk, chunk + 1))
        keys, places, numbers = [], [], []
        for number, part in enumerate(parts):
            start = np.searchsorted(part[0], np.uint64(low))
            stop = part.shape[1] if chunk == chunks - 1 else np.searchsorted(part[0], np.uint64(high))
            keys.append(np.array(part[0, start:stop]))
            places.append(np.array(part[1, start:stop]))
            numbers.append(np.full(stop - start, number, np.uint64))
        key, place, number_of = map(np.concatenate, (keys, places, numbers))
        order = np.argsort(key, kind="stable")
        key, place, number_of = key[order], place[order], number_of[order]
        starts = np.flatnonzero(np.diff(key, prepend=~key[:1]))
        sizes = np.diff(starts, append=len(key))
        first, sizes = np.repeat(starts, sizes), np.repeat(sizes, sizes)
        several = sizes > 1
        shifted = np.cumsum(several) - 1  # where a row goes when single ones are left out
        documents = number_of << np.uint64(32) | place >> np.uint64(32)
        details = place & np.uint64(2**32 - 1)
        yield Groups(documents[several], details[several], shifted[first[several]], sizes[several])


class Verdicts:
    """Verdicts of a corpus step: one file per part that has any."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, documents: U64, others: U64, values: Any = 0, details: Any = 0) -> None:
        """Add verdicts on documents (part << 32 | index): another document each, a value, a detail."""
        rows = np.empty(len(documents), VERDICT)
        rows["document"], rows["other"] = documents & np.uint64(2**32 - 1), others
        rows["value"], rows["detail"] = values, details
        parts = documents >> np.uint64(32)
        for part in np.unique(parts).tolist():
            with self._path(part).open("ab") as file:
                file.write(rows[parts == part].tobytes())

    def read(self, part: int) -> NDArray[Any]:
        """Verdicts on a part, sorted by document and detail."""
        path = self._path(part)
        rows = np.fromfile(path, VERDICT) if path.exists() else np.empty(0, VERDICT)
        return rows[np.lexsort((rows["detail"], rows["document"]))]

    def _path(self, part: int) -> Path:
        return self.folder / f"{part}.bin"
