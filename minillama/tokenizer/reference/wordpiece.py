"""WordPiece: training by mutual information, and greedy longest-match segmentation.

Schuster and Nakajima 2012; Devlin et al. 2019 (BERT). Continuation token pieces start with `##`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from minillama.errors import InputError
from minillama.tokenizer.reference.pairs import Pair, PairCounts, PairQueue

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
    """WordPiece training on word counts.

    The score of a pair is freq(ab) / (freq(a) freq(b)), the exponential of its pointwise mutual information
    up to a constant: `##g ##s` that occur only together win over a pair that is frequent because its parts
    are. The tokenizers library merges by count instead, which is BPE with another alphabet; `count` does so.
    Ties: the pair that occurred first.

    Args:
        vocab_size: token pieces in all; fewer when no pair is left.
        special: special tokens, first in the vocabulary.
        min_count: minimum pair frequency. Two rare parts that occur together once have the greatest
            mutual information of all.
        alphabet: token pieces besides those of the words.

    Returns:
        Token pieces: special tokens, the sorted alphabet, then the merged ones in order.

    Raises:
        InputError: an unknown score.
    """
    if score not in ("information", "count"):
        raise InputError("unknown score", where="score", found=score, expected="information or count")
    symbols = [[word[0], *(CONTINUATION + char for char in word[1:])] for word in words if word]
    corpus = PairCounts(symbols, [count for word, count in words.items() if word])
    pieces = dict.fromkeys([*special, *sorted({*alphabet, *corpus.symbols})])
    partners: defaultdict[str, dict[Pair, None]] = defaultdict(dict)

    def value(pair: Pair) -> float:
        count = corpus.pairs[pair]
        if count < min_count:
            return 0
        return count if score == "count" else count / (corpus.symbols[pair[0]] * corpus.symbols[pair[1]])

    def push(pairs: Collection[Pair]) -> None:
        queue.push(pairs)
        for pair in pairs:
            for part in pair:
                partners[part][pair] = None

    queue = PairQueue(value, corpus.first_seen.__getitem__)
    push(corpus.pairs)
    while len(pieces) < vocab_size and (best := queue.pop()) is not None:
        joined = best[0] + best[1].removeprefix(CONTINUATION)
        pieces[joined] = None
        changed = corpus.merge(best, joined)
        # the parts became rarer, which raises the score of all their other pairs
        push(dict.fromkeys([*changed, *partners[best[0]], *partners[best[1]]]))
    return list(pieces)


def encode(
    word: str, pieces: Mapping[str, int], unknown: str = "[UNK]", longest: int = 100, continuation: str = CONTINUATION
) -> list[str]:
    """WordPiece segmentation: greedy longest match from the left.

    Args:
        pieces: vocabulary, by token piece.
        unknown: the token of a word without a match, or of more than `longest` characters.
        continuation: prefix of continuation token pieces.
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
    """Words separated by single spaces; the original whitespace is lost."""
    return " ".join(pieces).replace(" " + CONTINUATION, "")
