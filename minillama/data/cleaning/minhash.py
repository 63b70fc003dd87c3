"""Near duplicates by MinHash and LSH: similar sets of word n-grams (Broder 1997; as FineWeb, arXiv 2406.17557).

Two documents of Jaccard similarity s share a band with probability 1 - (1 - s^rows)^bands. Pairs that share one are
verified by the share of equal hashes before they are joined, so that no cluster grows by accidents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from minillama.data.cleaning.document import Draft, Removal
from minillama.data.cleaning.grouping import U64, CorpusStep, Groups, Rows, Verdicts, groups, table
from minillama.data.cleaning.words import words

_MIX = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 2048  # n-grams hashed at once
_ROUNDS = 16  # leaders tried per group
SIGNATURES = ".signatures"


def shingles(text: str, n: int) -> U64:
    """Hashes of the distinct n-grams of lowercase words without punctuation; of Chinese, of characters."""
    found = [word for word in words(text.lower()) if word[0].isalnum()]
    known = {word: crc32(word.encode(errors="replace")) for word in set(found)}
    ids = np.array([known[word] for word in found], np.uint64)
    n = min(n, len(ids))
    mixed = np.zeros(len(ids) - n + 1 if n else 0, np.uint64)
    for i in range(n):
        mixed = (mixed ^ ids[i : i + len(mixed)]) * _MIX
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


@dataclass(frozen=True)
class NearDuplicates(CorpusStep):
    """Near duplicates: of a cluster the first document is kept, by the order of sources, files and records."""

    name: Literal["near-duplicates"] = "near-duplicates"
    ngram: int = field(default=5, metadata={"min": 1})
    bands: int = field(default=14, metadata={"min": 1, "max": 256})
    rows: int = field(default=8, metadata={"min": 1, "max": 64})
    similarity: float = field(default=0.75, metadata={"above": 0, "max": 1})
    """Share of equal hashes, an estimate of the Jaccard similarity, from which a pair that shares a band counts."""
    seed: int = field(default=0, metadata={"min": 0})

    def signature(self, text: str) -> NDArray[np.uint32]:
        """MinHash signature (bands * rows,): minima of the upper half of a h + b over the n-gram hashes h of a text."""
        a, b = _functions(self)
        minima = np.full(len(a), 2**64 - 1, np.uint64)
        found = shingles(text, self.ngram)
        for start in range(0, len(found), _BLOCK):
            np.minimum(minima, (a * found[start : start + _BLOCK] + b).min(1), out=minima)
        return (minima >> np.uint64(32)).astype(np.uint32)

    def band_keys(self, signature: NDArray[np.uint32]) -> U64:
        """(bands,) hashes of the bands."""
        keys = np.arange(self.bands, dtype=np.uint64)
        for column in signature.reshape(self.bands, self.rows).T:
            keys = (keys ^ column) * _MIX
            keys ^= keys >> np.uint64(32)
        return keys

    def collect(self, rows: Rows, draft: Draft) -> None:
        signature = self.signature(draft.text)
        if (signature == 2**32 - 1).all():
            return  # no word at all
        rows.add_to(SIGNATURES, np.insert(signature, 0, draft.index))
        for key in self.band_keys(signature).tolist():
            rows.add_row(key, draft.index)

    def decide(self, collected: Sequence[Path], verdicts: Verdicts) -> dict[str, Any]:
        find, parent = _Signature(collected), dict[int, int]()
        for group in groups(collected):
            for one, other in self._similar(group, find):
                low, high = sorted((_root(parent, one), _root(parent, other)))
                if low != high:
                    parent[high] = low
        clusters = [(document, _root(parent, document)) for document in sorted(parent)]
        sizes = Counter(root for _, root in clusters)
        if clusters:
            documents, roots = np.array(clusters, np.uint64).T
            verdicts.add(documents, roots, (find(documents) == find(roots)).mean(1))
        largest = [[f"{find.names[root >> 32]}-{root % 2**32}", size + 1] for root, size in sizes.most_common(10)]
        return {"duplicates": len(clusters), "clusters": len(sizes), "largest": largest}

    def _similar(self, group: Groups, find: _Signature) -> list[tuple[int, int]]:
        """Pairs of a group's leader and those like it; the rest of the group gets another leader."""
        pairs: set[tuple[int, int]] = set()
        documents, leader = group.documents, group.first
        for _ in range(_ROUNDS):
            rest = np.flatnonzero(leader < np.arange(len(leader)))
            if not len(rest):
                break
            ones, others = documents[leader[rest]], documents[rest]
            known = [pair in pairs for pair in zip(ones.tolist(), others.tolist(), strict=True)]
            like = np.array(known)
            unknown = np.flatnonzero(~like)
            for start in range(0, len(unknown), _BLOCK * 16):
                part = unknown[start : start + _BLOCK * 16]
                like[part] = (find(ones[part]) == find(others[part])).mean(1) >= self.similarity
            pairs.update(zip(ones[like].tolist(), others[like].tolist(), strict=True))
            unlike, old = rest[~like], leader[rest[~like]]
            starts = np.diff(old, prepend=-1) != 0
            fresh = np.arange(len(leader))
            fresh[unlike] = unlike[np.maximum.accumulate(np.where(starts, np.arange(len(unlike)), 0))]
            leader = fresh
        return sorted(pairs)

    def settle(self, draft: Draft, found: NDArray[Any], names: Sequence[str]) -> Removal | None:
        return self.like_another(draft, found, names, "duplicate", "similarity")


def _functions(step: NearDuplicates) -> tuple[U64, U64]:
    """(P, 1) odd factors and offsets."""
    draws = np.random.PCG64(step.seed).random_raw(2 * step.bands * step.rows).reshape(2, -1, 1)
    return draws[0] | np.uint64(1), draws[1]


class _Signature:
    """Signatures of documents (part << 32 | index), from disk."""

    def __init__(self, collected: Sequence[Path]) -> None:
        self.names = [path.name.partition(".rows")[0] for path in collected]
        self._parts = [table(path, SIGNATURES) for path in collected]
        self._indices = [np.array(part[:, 0]) for part in self._parts]

    def __call__(self, documents: U64) -> NDArray[np.uint32]:
        """(N, P) signatures."""
        made = np.empty((len(documents), max(part.shape[1] for part in self._parts) - 1), np.uint32)
        parts = documents >> np.uint64(32)
        for part in np.unique(parts).tolist():
            chosen = parts == part
            rows = np.searchsorted(self._indices[part], documents[chosen] & np.uint64(2**32 - 1))
            made[chosen] = self._parts[part][rows, 1:]
        return made


def _root(parent: dict[int, int], document: int) -> int:
    while document in parent:
        above = parent[document]
        if above in parent:
            parent[document] = parent[above]
        document = above
    return document
