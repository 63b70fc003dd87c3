"""Gopher's rules: quality and repetition (arXiv 2112.11446, appendix A.1.1, table A1)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from minillama.data.cleaning.document import Draft, Figures, Step
from minillama.data.cleaning.words import words

ENGLISH = ("the", "be", "to", "of", "and", "that", "have", "with")
_PARAGRAPHS, _LINES = re.compile(r"\n{2,}"), re.compile(r"\n+")


@dataclass(frozen=True)
class GopherQuality(Step):
    """Gopher's quality rules: number and length of words, symbols, bullets, ellipses, stop words."""

    name: Literal["gopher-quality"] = "gopher-quality"
    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_hashes: float = 0.1
    """`#` per word; the same for ellipses."""
    max_ellipses: float = 0.1
    max_bullet_lines: float = 0.9
    """Share of lines that begin with a bullet; the same for those that end in an ellipsis."""
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    """Share of words with a letter."""
    min_stop_words: int = 2
    """Different stop words."""
    stop_words: tuple[str, ...] = ENGLISH

    def measure(self, draft: Draft) -> Figures:
        text, found = draft.text, words(draft.text)
        lines, distinct = text.splitlines() or [""], Counter(found)
        lengths = Counter[int]()
        alphabetic = 0
        for word, count in distinct.items():
            if any(map(str.isalpha, word)):
                alphabetic += count
            if word[0].isalnum() or word[0] == "_":  # the pattern never joins a mark to a letter
                lengths[len(word)] += count
        count, total = lengths.total(), max(len(found), 1)
        ellipsis_ends = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        return {
            "words": count,
            "word_length": sum(length * n for length, n in lengths.items()) / max(count, 1),
            "hashes": text.count("#") / total,
            "ellipses": (text.count("...") + text.count("…")) / total,
            "bullet_lines": sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines),
            "ellipsis_lines": ellipsis_ends / len(lines),
            "alphabetic_words": alphabetic / total,
            "stop_words": sum(word in distinct for word in self.stop_words),
        }


@dataclass(frozen=True)
class GopherRepetition(Step):
    """Gopher's repetition rules: shares of the characters in repeated lines, paragraphs and n-grams of words.

    Of 2- to 4-grams the most frequent one counts, if it occurs twice; of 5- to 10-grams all that occurred before.
    """

    name: Literal["gopher-repetition"] = "gopher-repetition"
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_paragraph_characters: float = 0.2
    max_duplicate_lines: float = 0.3
    max_duplicate_line_characters: float = 0.2
    max_top_2_gram: float = 0.2
    max_top_3_gram: float = 0.18
    max_top_4_gram: float = 0.16
    max_duplicate_5_grams: float = 0.15
    max_duplicate_6_grams: float = 0.14
    max_duplicate_7_grams: float = 0.13
    max_duplicate_8_grams: float = 0.12
    max_duplicate_9_grams: float = 0.11
    max_duplicate_10_grams: float = 0.10

    def measure(self, draft: Draft) -> Figures:
        text, size = draft.text, max(len(draft.text), 1)
        figures = {}
        for unit, parts in ("paragraph", _PARAGRAPHS.split(text.strip())), ("line", _LINES.split(text)):
            filled = [part for part in parts if part.strip()]
            count, characters = duplicates(filled)
            figures[f"duplicate_{unit}s"] = count / max(len(filled), 1)
            figures[f"duplicate_{unit}_characters"] = characters / size
        for n, top, repeated in _ngrams(words(text)):
            figures[f"top_{n}_gram" if n < 5 else f"duplicate_{n}_grams"] = (top if n < 5 else repeated) / size
        return figures


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """Number and characters of the parts that occurred before."""
    distinct = set(parts)
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


def _ngrams(found: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """For n from 2 to 10: characters of the most frequent n-gram, spaces included, and of those that occurred before.

    The former is the first of equals, and 0 if it occurs once; the latter are counted without overlap from the left.
    """
    known = {word: i for i, word in enumerate(dict.fromkeys(found))}
    ids = grams = np.array([known[word] for word in found], np.int64)
    ends = list(accumulate(map(len, found), initial=0))
    for n in range(2, 11):
        keys = grams[:-1] * len(known) + ids[n - 1 :]  # an n-gram is an (n-1)-gram and a word
        _, first, grams, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        if not len(counts) or counts.max() == 1:
            yield from ((longer, 0, 0) for longer in range(n, 11))  # without a repeated n-gram there is no longer one
            return
        start = int(first[counts == counts.max()].min())
        top = int(counts.max()) * (ends[start + n] - ends[start] + n - 1)
        seen, repeated, free = set[int](), 0, 0
        places = np.flatnonzero(counts[grams] > 1)
        for place, gram in zip(places.tolist(), grams[places].tolist(), strict=True):
            if place < free:
                continue
            if gram in seen:
                repeated += ends[place + n] - ends[place]
                free = place + n
            seen.add(gram)
        yield n, top, repeated
