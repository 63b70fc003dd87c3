"""WordPiece: join the pair that says most about each other, and cut words by the longest piece from the left.

Schuster and Nakajima 2012; Devlin et al. 2019 (BERT). Pieces that go on within a word start with `##`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

from minillama.errors import InputError
from minillama.tokenizer.reference.pairs import Pair, PairCounts

__all__ = ["CONTINUATION", "Score", "decode", "encode", "train"]

CONTINUATION = "##"
Score = Literal["information", "count"]


def train(
    words: Mapping[str, int],
    vocab_size: int,
    score: Score = "information",
    special: tuple[str, ...] = ("[UNK]",),
    min_count: int = 1,
    alphabet: Iterable[str] = (),
) -> list[str]:
    """Learn a vocabulary from words and how often each occurs.

    The score of a pair is freq(ab) / (freq(a) freq(b)), the exponential of its pointwise mutual information
    but for a constant: `##g ##s` that occur together only win over a pair that is common because its parts
    are. The tokenizers library joins by count instead, which is BPE with another alphabet; `count` does so.
    Of equal scores the pair that was seen first wins.

    Args:
        words: word -> count.
        vocab_size: pieces in all; fewer when no pair is left.
        score: what is greatest of the pair that is joined.
        special: pieces that come first.
        min_count: pairs rarer than this are left alone. Two rare parts that met once have the greatest
            mutual information of all.
        alphabet: pieces that are there besides those of the words.

    Returns:
        The pieces: special ones, the alphabet in order, then the joined ones as they were learned.

    Raises:
        InputError: an unknown score.
    """
    if score not in ("information", "count"):
        raise InputError("unknown score", where="score", found=score, expected="information or count")
    cut = [[word[0], *(CONTINUATION + char for char in word[1:])] for word in words if word]
    corpus = PairCounts(cut, [count for word, count in words.items() if word])
    pieces = dict.fromkeys([*special, *sorted({*alphabet, *corpus.symbols})])
    partners: defaultdict[str, dict[Pair, None]] = defaultdict(dict)

    def value(pair: Pair) -> float:
        count = corpus.pairs[pair]
        return count if score == "count" else count / (corpus.symbols[pair[0]] * corpus.symbols[pair[1]] or 1)

    heap: list[tuple[float, int, Pair]] = []

    def push(pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            if corpus.pairs[pair] >= min_count:
                heapq.heappush(heap, (-value(pair), corpus.born[pair], pair))
                for part in pair:
                    partners[part][pair] = None

    push(list(corpus.pairs))
    while len(pieces) < vocab_size and heap:
        known, _, best = heapq.heappop(heap)
        if corpus.pairs[best] < min_count or known != -value(best):
            continue  # changed since; what it became is in the heap as well
        joined = best[0] + best[1].removeprefix(CONTINUATION)
        pieces[joined] = None
        changed = corpus.merge(best, joined)
        # the parts have become rarer, which raises the score of all their other pairs
        push(dict.fromkeys([*changed, *partners[best[0]], *partners[best[1]]]))
    return list(pieces)


def encode(
    word: str, pieces: Mapping[str, int], unknown: str = "[UNK]", longest: int = 100, continuation: str = CONTINUATION
) -> list[str]:
    """Cut a word: the longest piece that fits, again from where it ends.

    Args:
        word: the word.
        pieces: the vocabulary, by piece.
        unknown: what the whole word becomes when nothing fits somewhere, or it is too long.
        longest: characters of a word at most.
        continuation: what pieces within a word start with.
    """
    if len(word) > longest:
        return [unknown]
    result: list[str] = []
    start = 0
    while start < len(word):
        prefix = continuation if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if prefix + word[start:end] in pieces), None)
        if end is None:
            return [unknown]
        result.append(prefix + word[start:end])
        start = end
    return result


def decode(pieces: Iterable[str]) -> str:
    """The words with a blank between them; how they stood apart in the text is lost."""
    return " ".join(pieces).replace(" " + CONTINUATION, "")
