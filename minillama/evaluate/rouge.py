"""ROUGE-L of two texts, and a search for the texts most like another among very many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import heappush, heapreplace
from itertools import pairwise

import numpy as np
import regex
from numpy.typing import NDArray

_BY_CHARACTER = "Han|Hiragana|Katakana|Thai|Lao|Khmer|Myanmar|Tibetan"
_CHARACTER = "".join(rf"\p{{{script}}}" for script in _BY_CHARACTER.split("|"))
_TOKEN = regex.compile(
    rf"[a-z0-9]+|[{_CHARACTER}]|[\p{{L}}--\p{{Latin}}--\p{{Common}}--{_CHARACTER}][\p{{L}}\p{{M}}--\p{{Latin}}]*",
    regex.V1,
)


def rouge_tokens(text: str) -> list[str]:
    """Tokens of ROUGE: runs of a-z and 0-9 in lower case, as of Google's rouge_score without stemming.

    Letters of scripts that this library throws away are tokens too: each character of those that are written without
    spaces (Chinese, Japanese, Thai), and words of the others. Latin letters with accents end a token, as there.
    """
    return _TOKEN.findall(text.lower())


def lcs(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö 2004)."""
    return _lcs(_masks(first), len(first), second)


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L F-measure 2PR / (P + R), with P = LCS / |first| and R = LCS / |second|; 0 where one has no token.

    Lin 2004, "ROUGE: a package for automatic evaluation of summaries"; 2PR / (P + R) = 2 LCS / (|first| + |second|).
    """
    a, b = rouge_tokens(first), rouge_tokens(second)
    return 2 * lcs(a, b) / (len(a) + len(b)) if a and b else 0.0


def _masks(tokens: Sequence[str]) -> dict[str, int]:
    """Bits of the places of each token."""
    masks: dict[str, int] = {}
    for place, token in enumerate(tokens):
        masks[token] = masks.get(token, 0) | 1 << place
    return masks


def _lcs(masks: dict[str, int], length: int, other: Sequence[str]) -> int:
    rows = whole = (1 << length) - 1  # a zero bit where the table of the textbook grows by one
    for token in other:
        if mask := masks.get(token):
            both = rows & mask
            rows = (rows + both | rows - both) & whole
    return length - rows.bit_count()


class Similar:
    """Index of texts by their tokens, for the most similar ones under ROUGE-L.

    LCS is at most the number of tokens that two texts share, so that 2 shared / (|a| + |b|) bounds ROUGE-L from above;
    texts are compared in the order of that bound until no further one can be among the best.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._tokens: list[list[str]] = []
        self._lengths = np.zeros(1024, np.int64)
        self._postings: dict[tuple[str, int], list[int]] = {}
        self._packed: dict[tuple[str, int], NDArray[np.int64]] = {}  # the same, as far as they were asked for

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str) -> None:
        """Add a text."""
        number, tokens = len(self.texts), rouge_tokens(text)
        if number == len(self._lengths):
            self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
        self._lengths[number] = len(tokens)
        self.texts.append(text)
        self._tokens.append(tokens)
        for key in _occurrences(tokens):
            self._postings.setdefault(key, []).append(number)

    def search(self, text: str, count: int = 1) -> list[tuple[float, str]]:
        """Most similar texts and their ROUGE-L, the best first and the older of equals first; none that shares nothing.

        Args:
            count: at most so many.
        """
        tokens = rouge_tokens(text)
        shared = np.zeros(len(self.texts), np.int64)
        for key in _occurrences(tokens):
            if key in self._postings:
                shared[self._posting(key)] += 1
        bounds = 2 * shared / np.maximum(1, self._lengths[: len(shared)] + len(tokens))
        found: list[tuple[float, int]] = []
        masks = _masks(tokens)
        for number in self._order(bounds):
            if len(found) == count and (bounds[number], -number) <= found[0]:
                break
            length = _lcs(masks, len(tokens), self._tokens[number])
            entry = (2 * length / (len(tokens) + len(self._tokens[number])), -number)
            if len(found) < count:
                heappush(found, entry)
            elif entry > found[0]:
                heapreplace(found, entry)
        return [(score, self.texts[-number]) for score, number in sorted(found, reverse=True)]

    def _order(self, bounds: NDArray[np.float64]) -> Iterator[int]:
        """Numbers of the texts that share a token, in descending order of the bound, and ascending among equals.

        Sorted part by part, as few are asked for.
        """
        for high, low in pairwise((2.0, 0.9, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0)):
            some = np.flatnonzero((bounds <= high) & (bounds > low))
            yield from some[np.argsort(-bounds[some], kind="stable")].tolist()

    def _posting(self, key: tuple[str, int]) -> NDArray[np.int64]:
        listed, packed = self._postings[key], self._packed.get(key)
        if packed is None or len(packed) < len(listed):
            rest = np.array(listed[0 if packed is None else len(packed) :], np.int64)
            packed = self._packed[key] = rest if packed is None else np.concatenate([packed, rest])
        return packed


def _occurrences(tokens: Sequence[str]) -> list[tuple[str, int]]:
    """Tokens numbered among their equals, so that sets of them intersect as multisets do."""
    counts: Counter[str] = Counter()
    found = []
    for token in tokens:
        counts[token] += 1
        found.append((token, counts[token]))
    return found
