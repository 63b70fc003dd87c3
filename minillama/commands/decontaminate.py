"""Decontamination of training data against evaluation sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated

import tyro

from minillama.commands.tables import print_table
from minillama.config.loader import check
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
    """Write the documents without overlap to this file, and beside it what a run's provenance repeats."""

    def run(self) -> int:
        """Decontaminate."""
        check(self)
        from minillama.evaluate import decontaminate

        index = decontaminate.Index(self.against, self.n)
        documents = list(decontaminate.texts(self.file))
        found = [index.hits(document.text, document.where) for document in documents]
        hits, bad = list(chain(*found)), sum(map(bool, found))
        sets = decontaminate.by_set(hits, index.items)
        print_table("set", ["items", "found"], [[name, str(of), str(hit)] for name, (hit, of) in sets.items()])
        share = bad / max(1, len(documents))
        print(f"{bad} of {len(documents)} documents ({share:.2%}) share {self.n}-grams with {len(sets)} sets", end="")
        print(f"; {index.short} items are too short to be looked for" if index.short else "")
        if self.report is not None:
            replace_text(self.report, json_lines(hit._asdict() for hit in hits))
        for hit in hits[:10] if self.report is None else ():
            print(f"  {hit.where}: {hit.item}: {''.join(c if c.isprintable() else ' ' for c in hit.words)}")
        if self.remove is not None:
            kept = [document.line for document, overlaps in zip(documents, found, strict=True) if not overlaps]
            decontaminate.write(self.remove, self.file, index, kept, bad)
            print(f"written: {self.remove}, {len(kept)} documents")
        return 0
