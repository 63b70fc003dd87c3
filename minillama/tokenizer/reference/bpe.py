"""Byte-pair encoding: merge the most frequent pair of adjacent symbols, repeatedly.

Gage 1994; Sennrich, Haddow and Birch 2016 (arXiv 1508.07909, Algorithm 1). Symbols are characters, or bytes as
one printable character each (`pre.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from minillama.errors import InputError
from minillama.tokenizer.reference.pairs import Pair, PairCounts, join

Merge = Pair
Ties = Literal["library", "first", "greatest"]


def train(
    words: Mapping[str, int],
    merges: int,
    ties: Ties = "library",
    alphabet: Iterable[str] = (),
    min_count: int = 1,
) -> list[Merge]:
    """BPE training on word counts.

    Count all pairs of adjacent symbols, weighted by the words' counts; merge all occurrences of the most frequent
    pair, from left to right; repeat.

    Args:
        words: word -> count. No merge crosses word boundaries.
        merges: number of merges at most; fewer when no pair is left.
        ties: tie-breaking between equally frequent pairs. `library`: the smaller ids, where
            ids are the sorted alphabet and then the merges in order (the tokenizers library); `first`: the
            first occurrence in the words as segmented now; `greatest`: the lexicographically greatest.
        alphabet: symbols besides those of the words; they matter for ids alone.
        min_count: minimum pair frequency.

    Raises:
        InputError: an unknown rule for ties.
    """
    if ties not in ("library", "first", "greatest"):
        raise InputError("unknown rule for ties", where="ties", found=ties, expected="library, first or greatest")
    corpus = PairCounts.of(words)
    ids = {symbol: i for i, symbol in enumerate(sorted({*alphabet, *corpus.symbols}))}

    def entry(pair: Merge) -> _Entry:
        return _Entry(corpus.pairs[pair], (ids[pair[0]], ids[pair[1]]), pair, ties == "greatest")

    heap = [entry(pair) for pair in corpus.pairs]
    heapq.heapify(heap)
    learned: list[Merge] = []
    while len(learned) < merges:
        best = _pop(heap, corpus)
        if best is None or best.count < min_count:
            break
        if ties == "first":
            equal = [best]
            while heap and heap[0].count == best.count:
                equal.append(heapq.heappop(heap))
            best = min((e for e in equal if e.count == corpus.pairs[e.pair]), key=lambda e: corpus.first(e.pair))
            for other in equal:
                if other.pair != best.pair:
                    heapq.heappush(heap, other)
        learned.append(best.pair)
        joined = best.pair[0] + best.pair[1]
        ids.setdefault(joined, len(ids))
        for pair in corpus.merge(best.pair, joined):
            if corpus.pairs[pair] > 0:
                heapq.heappush(heap, entry(pair))
    return learned


def _pop(heap: list[_Entry], corpus: PairCounts) -> _Entry | None:
    """The smallest entry that is not stale; a pair whose count has changed has a newer one in the heap."""
    while heap:
        entry = heapq.heappop(heap)
        if entry.count and entry.count == corpus.pairs[entry.pair]:
            return entry
    return None


@dataclass
class _Entry:
    """Heap entry of a pair; the smallest is the next merge."""

    count: int
    key: tuple[int, ...]
    pair: Merge
    greatest: bool

    def __lt__(self, other: _Entry) -> bool:
        if self.count != other.count:
            return self.count > other.count
        return self.pair > other.pair if self.greatest else self.key < other.key


def encode(
    word: Sequence[str], ranks: Mapping[Merge, int], step: Callable[[Merge, list[str]], object] | None = None
) -> list[str]:
    """BPE segmentation of a word: apply the merge of lowest rank until none applies.

    Args:
        word: its symbols.
        ranks: merge -> rank.
        step: called with each merge and the symbols after it.
    """
    symbols = list(word)
    while len(symbols) > 1:
        pair = min(pairwise(symbols), key=lambda p: ranks.get(p, len(ranks)))
        if pair not in ranks:
            break
        symbols = join(symbols, pair, pair[0] + pair[1])
        if step is not None:
            step(pair, symbols)
    return symbols
