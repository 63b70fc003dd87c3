"""Byte-pair encoding: merge the most frequent pair of adjacent symbols, repeatedly.

Gage 1994; Sennrich, Haddow and Birch 2016 (arXiv 1508.07909, Algorithm 1). Symbols are characters, or bytes as
one printable character each (`pre.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

from minillama.errors import InputError
from minillama.tokenizer.reference.pairs import Pair, PairCounts, PairQueue, join

Merge = Pair
Ties = Literal["library", "first", "greatest"]


def train(
    words: Mapping[str, int], merges: int, ties: Ties = "library", alphabet: Iterable[str] = (), min_count: int = 1
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

    Raises:
        InputError: an unknown rule for ties.
    """
    if ties not in ("library", "first", "greatest"):
        raise InputError("unknown rule for ties", where="ties", found=ties, expected="library, first or greatest")
    corpus = PairCounts([list(word) for word in words], list(words.values()))
    ids = {symbol: i for i, symbol in enumerate(sorted({*alphabet, *corpus.symbols}))}

    def count(pair: Pair) -> int:
        return corpus.pairs[pair] if corpus.pairs[pair] >= min_count else 0

    def key(pair: Pair) -> tuple[object, ...]:
        if ties == "greatest":  # the reverse of the lexicographic order; the end of a symbol comes last
            return tuple((*(-ord(char) for char in symbol), 1) for symbol in pair)
        return tuple(ids[symbol] for symbol in pair)

    queue = PairQueue(count, key)
    queue.push(corpus.pairs)
    learned: list[Merge] = []
    while len(learned) < merges and (best := queue.pop()) is not None:
        if ties == "first":
            equal = queue.pop_equal(best)
            best = corpus.first(equal)
            queue.push(equal - {best})
        joined = best[0] + best[1]
        learned.append(best)
        ids.setdefault(joined, len(ids))
        queue.push(corpus.merge(best, joined))
    return learned


def encode(
    word: Sequence[str], ranks: Mapping[Merge, int], step: Callable[[Merge, list[str]], object] | None = None
) -> list[str]:
    """BPE segmentation of a word's symbols: apply the merge of lowest rank until none applies.

    `step` is called with each merge and the symbols after it.
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
