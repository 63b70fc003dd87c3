"""Byte-pair encoding: merge the commonest pair of neighbors, again and again.

Gage 1994; Sennrich, Haddow and Birch 2016 (arXiv 1508.07909, Algorithm 1). The symbols here are whatever the
words are made of: characters, or bytes written as one character each (`bytelevel.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from minillama.errors import InputError
from minillama.tokenizer.reference.pairs import Pair, PairCounts, join

__all__ = ["Merge", "Ties", "encode", "train"]

Merge = Pair
Ties = Literal["library", "first", "greatest"]


def train(
    words: Mapping[str, int],
    merges: int,
    ties: Ties = "library",
    alphabet: Iterable[str] = (),
    min_count: int = 1,
) -> list[Merge]:
    """Learn merges from words and how often each occurs.

    Count all pairs of adjacent symbols, weighted by the words' counts; join the commonest pair wherever it
    stands, from left to right; repeat.

    Args:
        words: word -> count. No merge crosses from one word to the next.
        merges: how many to learn at most; fewer when no pair is left.
        ties: which of several equally common pairs is taken. `library`: the one with the smaller ids, where
            ids are the sorted alphabet and then the merges in order (the tokenizers library); `first`: the
            one that stands first in the words as they are cut now; `greatest`: the lexicographically greatest.
        alphabet: symbols that exist besides those of the words; they matter for ids alone.
        min_count: pairs rarer than this are left alone.

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
    """The smallest entry that is still true; those whose count has changed have a newer one in the heap."""
    while heap:
        entry = heapq.heappop(heap)
        if entry.count and entry.count == corpus.pairs[entry.pair]:
            return entry
    return None


@dataclass
class _Entry:
    """A pair in the heap; the smallest entry is the next merge."""

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
    """Cut a word: of the merges that apply, the earliest learned first, until none does.

    Args:
        word: its symbols.
        ranks: merge -> place in the order of learning.
        step: told each merge and the symbols after it.
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
