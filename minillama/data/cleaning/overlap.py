"""Books that contain one another: overlap of sampled word n-grams (MinHash by a modulus; LLaMA drops over 90%)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minillama.data.cleaning.document import Draft, Removal
from minillama.data.cleaning.grouping import CorpusStep, Rows, Verdicts, groups, table
from minillama.data.cleaning.minhash import shingles

SIZES = ".sizes"


@dataclass(frozen=True)
class Overlap(CorpusStep):
    """Documents whose n-grams stand in another one, to more than a share: the shorter goes, of equals the later."""

    name: Literal["overlap"] = "overlap"
    ngram: int = field(default=6, metadata={"min": 1})
    share: float = field(default=0.9, metadata={"above": 0, "max": 1})
    sample: int = field(default=16, metadata={"min": 1})
    """One n-gram in so many is compared."""
    frequent: int = field(default=100, metadata={"min": 2})
    """N-grams of more documents are left out: quotations, headers."""

    def collect(self, rows: Rows, draft: Draft) -> None:
        found = shingles(draft.text, self.ngram)
        chosen = found[found % np.uint64(self.sample) == 0].tolist()
        rows.add_to(SIZES, (draft.index, len(chosen)))
        for key in chosen:
            rows.add_row(key, draft.index)

    def decide(self, collected: Sequence[Path], verdicts: Verdicts) -> dict[str, Any]:
        sizes: dict[int, int] = {}
        for part, path in enumerate(collected):
            sizes |= {part << 32 | index: size for index, size in table(path, SIZES).tolist()}
        shared = Counter[tuple[int, int]]()
        for group in groups(collected):
            for start in np.flatnonzero((np.arange(len(group.first)) == group.first) & (group.sizes <= self.frequent)):
                shared.update(combinations(group.documents[start : start + group.sizes[start]].tolist(), 2))
        gone: dict[int, tuple[int, float]] = {}
        for (one, other), count in sorted(shared.items()):
            small, large = (other, one) if sizes[other] <= sizes[one] else (one, other)
            if count / sizes[small] > self.share and small not in gone:
                gone[small] = large, count / sizes[small]
        if gone:
            documents, others, values = zip(*((a, b, value) for a, (b, value) in gone.items()), strict=True)
            verdicts.add(np.array(documents, np.uint64), np.array(others, np.uint64), values)
        return {"contained": len(gone)}

    def settle(self, draft: Draft, found: NDArray[Any], names: Sequence[str]) -> Removal | None:
        return self.like_another(draft, found, names, "overlap", "share")
