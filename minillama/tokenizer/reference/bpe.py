"""Byte-pair encoding: merge the commonest pair of neighbours, again and again.

Gage 1994; Sennrich, Haddow and Birch 2016 (arXiv 1508.07909, Algorithm 1). The symbols here are whatever the
words are made of: characters, or bytes written as one character each (`bytelevel.py`).
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from minillama.errors import InputError

__all__ = ["Merge", "Ties", "encode", "train"]

Merge = tuple[str, str]
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
    stands, from left to right; repeat. A merge changes the counts around its own places alone, so only the
    words that hold the pair are gone through again.

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
    corpus = _Corpus(words)
    ids = {symbol: i for i, symbol in enumerate(sorted({*alphabet, *(s for word in corpus.words for s in word)}))}

    def entry(pair: Merge) -> _Entry:
        return _Entry(corpus.counts[pair], (ids[pair[0]], ids[pair[1]]), pair, ties == "greatest")

    heap = [entry(pair) for pair in corpus.counts]
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
            best = min((e for e in equal if e.count == corpus.counts[e.pair]), key=lambda e: corpus.first(e.pair))
            for other in equal:
                if other.pair != best.pair:
                    heapq.heappush(heap, other)
        learned.append(best.pair)
        ids.setdefault(best.pair[0] + best.pair[1], len(ids))
        for pair in corpus.merge(best.pair):
            if corpus.counts[pair] > 0:
                heapq.heappush(heap, entry(pair))
    return learned


def _pop(heap: list[_Entry], corpus: _Corpus) -> _Entry | None:
    """The smallest entry that is still true; those whose count has changed have a newer one in the heap."""
    while heap:
        entry = heapq.heappop(heap)
        if entry.count and entry.count == corpus.counts[entry.pair]:
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


@dataclass
class _Corpus:
    """Words as lists of symbols, with the count and the places of every pair."""

    table: Mapping[str, int]
    words: list[list[str]] = field(init=False)
    repeats: list[int] = field(init=False)
    counts: Counter[Merge] = field(default_factory=Counter)
    places: defaultdict[Merge, set[int]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self) -> None:
        self.words, self.repeats = [list(word) for word in self.table], list(self.table.values())
        for i in range(len(self.words)):
            self._count(i, +1)

    def _count(self, i: int, sign: int) -> list[Merge]:
        pairs = list(pairwise(self.words[i]))
        for pair in pairs:
            self.counts[pair] += sign * self.repeats[i]
            if sign > 0:
                self.places[pair].add(i)
        return pairs

    def first(self, pair: Merge) -> tuple[int, int]:
        """Word and place where the pair stands first."""
        for i in sorted(self.places[pair]):
            for at, two in enumerate(pairwise(self.words[i])):
                if two == pair:
                    return i, at
        raise KeyError(pair)

    def merge(self, pair: Merge) -> list[Merge]:
        """Join the pair everywhere; the pairs whose counts changed, in the order of their places."""
        changed: dict[Merge, None] = {}
        for i in sorted(self.places.pop(pair)):
            changed |= dict.fromkeys(self._count(i, -1))
            self.words[i] = join(self.words[i], pair)
            changed |= dict.fromkeys(self._count(i, +1))
        changed.pop(pair, None)
        return list(changed)


def join(symbols: Sequence[str], pair: Merge) -> list[str]:
    """The symbols with every occurrence of the pair joined, from left to right."""
    joined: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            joined.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            joined.append(symbols[i])
            i += 1
    return joined


def encode(word: Sequence[str], ranks: Mapping[Merge, int]) -> list[str]:
    """Cut a word: of the merges that apply, the earliest learned first, until none does.

    Args:
        word: its symbols.
        ranks: merge -> place in the order of learning.
    """
    symbols = list(word)
    while len(symbols) > 1:
        pair = min(pairwise(symbols), key=lambda p: ranks.get(p, len(ranks)))
        if pair not in ranks:
            break
        symbols = join(symbols, pair)
    return symbols
