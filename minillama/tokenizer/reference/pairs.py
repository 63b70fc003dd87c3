"""Pairs of adjacent symbols, for BPE and WordPiece training: incremental counts, and the queue of candidates.

A merge changes counts only around its own occurrences, so only the words that hold the pair are recounted.
A full recount per merge would take as long as the first count.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Pair = tuple[str, str]


@dataclass
class PairCounts:
    """Words as lists of symbols, with counts of words, of symbols, and of pairs of adjacent symbols.

    `first_seen` is the order of first occurrence per pair.
    """

    words: list[list[str]]
    repeats: Sequence[int]
    symbols: Counter[str] = field(default_factory=Counter)
    pairs: Counter[Pair] = field(default_factory=Counter)
    first_seen: dict[Pair, int] = field(default_factory=dict)
    _occurrences: defaultdict[Pair, set[int]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self) -> None:
        for i in range(len(self.words)):
            self._count(i, +1)

    def first(self, pairs: Container[Pair]) -> Pair:
        """The pair that occurs first in the words as segmented now."""
        return next(pair for symbols in self.words for pair in pairwise(symbols) if pair in pairs)

    def merge(self, pair: Pair, joined: str) -> list[Pair]:
        """Merge all occurrences of the pair; returns the pairs whose counts changed, in order of occurrence."""
        changed: dict[Pair, None] = {}
        for i in sorted(self._occurrences.pop(pair)):
            changed |= dict.fromkeys(self._count(i, -1))
            self.words[i] = join(self.words[i], pair, joined)
            changed |= dict.fromkeys(self._count(i, +1))
        changed.pop(pair, None)
        return list(changed)

    def _count(self, i: int, sign: int) -> list[Pair]:
        weight, pairs = sign * self.repeats[i], list(pairwise(self.words[i]))
        for symbol in self.words[i]:
            self.symbols[symbol] += weight
        for pair in pairs:
            self.pairs[pair] += weight
            if sign > 0:
                self._occurrences[pair].add(i)
                self.first_seen.setdefault(pair, len(self.first_seen))
        return pairs


@dataclass
class PairQueue:
    """Priority queue of pairs, greatest score first; ties: the smallest key.

    A pair is pushed again when its score changes; entries with an old score are skipped.
    """

    score: Callable[[Pair], float]
    key: Callable[[Pair], Any]
    _heap: list[tuple[float, Any, Pair]] = field(default_factory=list)

    def push(self, pairs: Iterable[Pair]) -> None:
        """Add pairs, or their new scores; scores of 0 are left out."""
        for pair in pairs:
            if score := self.score(pair):
                heapq.heappush(self._heap, (-score, self.key(pair), pair))

    def pop(self) -> Pair | None:
        """The first pair, None when none is left."""
        while self._heap:
            score, _, pair = heapq.heappop(self._heap)
            if -score == self.score(pair):
                return pair
        return None

    def pop_equal(self, pair: Pair) -> set[Pair]:
        """All pairs with the score of this one, itself included."""
        equal, score = {pair}, self.score(pair)
        while self._heap and -self._heap[0][0] == score:
            other = heapq.heappop(self._heap)[-1]
            if self.score(other) == score:
                equal.add(other)
        return equal


def join(symbols: Sequence[str], pair: Pair, joined: str) -> list[str]:
    """The symbols with every occurrence of the pair merged, from left to right."""
    result: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            result.append(joined)
            i += 2
        else:
            result.append(symbols[i])
            i += 1
    return result
