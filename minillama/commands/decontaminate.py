"""Decontamination of training data against evaluation sets."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from minillama.commands.tables import print_table
from minillama.config.loader import check
from minillama.errors import InputError
from minillama.files import json_lines, replace_text


@dataclass(frozen=True)
class Decontaminate:
    """Find, list and remove documents that share n-grams with evaluation sets: 13 words, or Chinese characters."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Training data: a .jsonl or .json file of records, or a text, whose paragraphs are the documents."""
    against: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the evaluation sets, as for `minillama eval`."""
    n: int = field(default=13, metadata={"min": 1})
    """Words per n-gram."""
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every overlap as a line of JSON; the first ten are printed otherwise."""
    remove: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the documents without overlap to this file, .gz compressed, and beside it what a run's provenance
    repeats."""

    def run(self) -> int:
        """Decontaminate."""
        check(self)
        from minillama.evaluate import decontaminate

        for option, path in (("--remove", self.remove), ("--report", self.report)):
            if path is not None and path.exists() and self.file.exists() and path.samefile(self.file):
                raise InputError("this would overwrite the training data", where=option, found=path, fix="give another")
        index, hits, counts = decontaminate.Index(self.against, self.n), list[decontaminate.Hit](), Counter[bool]()

        def kept() -> Iterator[str | None]:
            for document in decontaminate.texts(self.file):
                found = index.hits(document.text, document.where)
                hits.extend(found)
                counts[bool(found)] += 1
                yield None if found else document.line

        if self.remove is None:
            deque(kept(), maxlen=0)
        else:
            decontaminate.write(self.remove, self.file, index, kept())
        bad, total = counts[True], counts.total()
        sets = decontaminate.by_set(hits, index.items)
        print_table("set", ["items", "found"], [[name, str(of), str(hit)] for name, (hit, of) in sets.items()])
        share = bad / max(1, total)
        print(f"{bad} of {total} documents ({share:.2%}) share {self.n}-grams with {len(sets)} sets", end="")
        print(f"; {index.short} items are too short to be looked for" if index.short else "")
        if self.report is not None:
            replace_text(self.report, json_lines(hit._asdict() for hit in hits))
        for hit in hits[:10] if self.report is None else ():
            print(f"  {hit.where}: {hit.item}: {''.join(c if c.isprintable() else ' ' for c in hit.words)}")
        if self.remove is not None:
            print(f"written: {self.remove}, {total - bad} documents")
        return 0
