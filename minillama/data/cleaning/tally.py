"""Tally of a cleaning: counts per step, samples of figures and of documents, languages, hosts; parts add up."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from minillama.data.cleaning.document import Draft, Removal, Step
from minillama.data.cleaning.duplicates import host_of

READ = -1
HOSTS, EXCERPT = 200, 600


@dataclass
class Sample:
    """Uniform sample: the items of the smallest hashes of their document's id, whatever the order of the documents."""

    size: int
    items: list[list[Any]] = field(default_factory=list)

    def wants(self, key: int) -> bool:
        """Whether an item of this hash is in the sample so far."""
        return len(self.items) < self.size or key < self.items[-1][0]

    def add(self, key: int, name: str, item: Any) -> None:
        """Add an item."""
        insort(self.items, [key, name, item], key=lambda entry: entry[:2])
        del self.items[self.size :]


class Counts:
    """Counts and samples of one step."""

    def __init__(self) -> None:
        self.documents = self.bytes = self.bytes_after = 0
        self.seconds, self.removed = 0.0, Counter[str]()
        self.figures, self.kept_examples, self.removed_examples = Sample(500), Sample(10), Sample(10)

    def merge(self, table: dict[str, Any]) -> None:
        """Add what another's `to_table` gave."""
        for name, value in table.items():
            mine = getattr(self, name)
            if isinstance(mine, Sample):
                for entry in value:
                    if mine.wants(entry[0]):
                        mine.add(*entry)
            else:
                setattr(self, name, mine + (Counter(value) if isinstance(mine, Counter) else value))

    def to_table(self) -> dict[str, Any]:
        """JSON object of it."""
        return {name: value.items if isinstance(value, Sample) else value for name, value in vars(self).items()}


class Tally:
    """Counts per step, by its number in the pipeline; `READ` is reading."""

    def __init__(self) -> None:
        self.steps: dict[int, Counts] = {}
        self.languages, self.hosts = Counter[str](), Counter[str]()

    def step(self, number: int) -> Counts:
        """Counts of a step."""
        return self.steps.setdefault(number, Counts())

    def judged(self, number: int, name: str, draft: Draft, removal: Removal | None, sizes: tuple[int, int]) -> None:
        """Count a document that a step has judged; `sizes` are its bytes before and after."""
        counts, key, figures = self.step(number), crc32(draft.id.encode()), draft.measured.get(name, {})
        counts.documents += 1
        counts.bytes += sizes[0]
        if figures and counts.figures.wants(key):
            numbers = {name: value for name, value in figures.items() if not isinstance(value, str)}
            counts.figures.add(key, draft.id, numbers)
        examples = counts.removed_examples if removal else counts.kept_examples
        if examples.wants(key):
            excerpt: dict[str, Any] = {
                "where": draft.where,
                "text": draft.text[:EXCERPT],
                "figures": figures,
                "removal": removal or [],
            }
            examples.add(key, draft.id, excerpt)
        if removal:
            counts.removed[removal.reason] += 1
        else:
            counts.bytes_after += sizes[1]

    def finished(self, draft: Draft) -> None:
        """Count a document that passed all steps."""
        self.languages[draft.language or "not identified"] += 1
        if host := host_of(draft.url):
            self.hosts[host] += 1

    def to_table(self) -> dict[str, Any]:
        """JSON object of it; of the hosts those with the most documents."""
        steps = {str(number): counts.to_table() for number, counts in sorted(self.steps.items())}
        hosts = sorted(self.hosts.items(), key=lambda item: (-item[1], item[0]))[:HOSTS]
        return {"steps": steps, "languages": dict(sorted(self.languages.items())), "hosts": dict(hosts)}

    @classmethod
    def total(cls, tables: Iterable[dict[str, Any]]) -> Tally:
        """Sum of the parts' tallies."""
        total = cls()
        for table in tables:
            for number, counts in table["steps"].items():
                total.step(int(number)).merge(counts)
            total.languages.update(table["languages"])
            total.hosts.update(table["hosts"])
        return total

    def funnel(self, steps: Sequence[Step]) -> list[dict[str, Any]]:
        """Per step: documents and bytes left of all that were read, those removed by reason, what it saw."""
        rows, documents, size = [], self.step(READ).documents, self.step(READ).bytes
        for number, name in enumerate(["read", *(step.key for step in steps)], READ):
            counts = self.step(number)
            documents -= counts.removed.total()
            size -= counts.bytes - counts.bytes_after
            row = {"step": name, "seen": counts.documents, "documents": documents, "bytes": size}
            rows.append(row | {"removed": dict(sorted(counts.removed.items()))})
        return rows
