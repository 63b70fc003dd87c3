"""WordPiece: join the pair that says most about each other, and cut words by the longest piece from the left.

Schuster and Nakajima 2012; Devlin et al. 2019 (BERT). Pieces that go on within a word start with `##`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from minillama.errors import InputError

__all__ = ["CONTINUATION", "Score", "encode", "train"]

CONTINUATION = "##"
Score = Literal["information", "count"]
Pair = tuple[str, str]


def train(
    words: Mapping[str, int], vocab_size: int, score: Score = "information", special: tuple[str, ...] = ("[UNK]",)
) -> list[str]:
    """Learn a vocabulary from words and how often each occurs.

    The score of a pair is freq(ab) / (freq(a) freq(b)), the exponential of its pointwise mutual information
    but for a constant: `##g ##s` that occur together only win over a pair that is common because its parts
    are. The tokenizers library joins by count instead, which is BPE with another alphabet; `count` does so.
    Of equal scores the pair that stands first in the words wins.

    Args:
        words: word -> count.
        vocab_size: pieces in all; fewer when no pair is left.
        score: what is greatest of the pair that is joined.
        special: pieces that come first.

    Returns:
        The pieces: special ones, the alphabet in order, then the joined ones as they were learned.

    Raises:
        InputError: an unknown score.
    """
    if score not in ("information", "count"):
        raise InputError("unknown score", where="score", found=score, expected="information or count")
    cut = [[word[0], *(CONTINUATION + char for char in word[1:])] for word in words if word]
    repeats = [count for word, count in words.items() if word]
    pieces = dict.fromkeys([*special, *sorted({piece for word in cut for piece in word})])
    singles, pairs, places = Counter[str](), Counter[Pair](), dict[Pair, set[int]]()

    def count(i: int, sign: int) -> None:
        for piece in cut[i]:
            singles[piece] += sign * repeats[i]
        for pair in pairwise(cut[i]):
            pairs[pair] += sign * repeats[i]
            places.setdefault(pair, set()).add(i)

    for i in range(len(cut)):
        count(i, +1)
    while len(pieces) < vocab_size:
        pairs = +pairs  # those that are left
        if not pairs:
            break
        value = pairs if score == "count" else {(a, b): n / (singles[a] * singles[b]) for (a, b), n in pairs.items()}
        greatest = max(value.values())
        best = min((pair for pair in value if value[pair] == greatest), key=lambda pair: _first(pair, cut, places))
        joined = best[0] + best[1].removeprefix(CONTINUATION)
        pieces[joined] = None
        for i in sorted(places.pop(best)):
            count(i, -1)
            cut[i] = _join(cut[i], best, joined)
            count(i, +1)
    return list(pieces)


def _first(pair: Pair, cut: list[list[str]], places: Mapping[Pair, set[int]]) -> tuple[int, int]:
    return min((i, at) for i in places[pair] for at, two in enumerate(pairwise(cut[i])) if two == pair)


def _join(symbols: list[str], pair: Pair, joined: str) -> list[str]:
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] = joined
        else:
            result.append(symbol)
    return result


def encode(word: str, pieces: Mapping[str, int], unknown: str = "[UNK]", longest: int = 100) -> list[str]:
    """Cut a word: the longest piece that fits, again from where it ends.

    Args:
        word: the word.
        pieces: the vocabulary, by piece.
        unknown: what the whole word becomes when nothing fits somewhere, or it is too long.
        longest: characters of a word at most.
    """
    if len(word) > longest:
        return [unknown]
    result: list[str] = []
    start = 0
    while start < len(word):
        prefix = CONTINUATION if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if prefix + word[start:end] in pieces), None)
        if end is None:
            return [unknown]
        result.append(prefix + word[start:end])
        start = end
    return result
