"""Masked-span sampling: short spans, whole sentences, or one long span.

Du et al. 2022, arXiv 2103.10360, §2.1 and §2.2. A span never holds a separator between documents. All
functions return non-overlapping (start, stop) pairs, in the order of the text.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from minillama.tokenizer import Tokenizer

LONGEST = 39  # tokens of a short span

_SENTENCE_ENDS = frozenset(".?!;:\n\u3002\uff1f\uff01\uff1b\uff1a\u2026")
Span = tuple[int, int]
Flags = NDArray[np.bool_]


def span_lengths(mean: float) -> NDArray[np.float64]:
    """Zero-truncated Poisson distribution of span lengths 1..39, (39,): e^-mean mean^k / k!, normalized."""
    lengths = np.arange(1, LONGEST + 1)
    logs = lengths * math.log(mean) - np.array([math.lgamma(k + 1) for k in lengths.tolist()])
    weights: NDArray[np.float64] = np.exp(logs - logs.max())
    return weights / weights.sum()


def sentence_ends(tokenizer: Tokenizer, vocab_size: int) -> Flags:
    """Sentence-final tokens, (vocab_size,): those with a full stop, a question mark or the like, or a newline."""
    ends = np.zeros(vocab_size, bool)
    for i in set(range(tokenizer.vocab_size)) - tokenizer.special_ids:
        if tokenizer.backend.id_to_token(i) is not None:
            ends[i] = any(char in _SENTENCE_ENDS for char in tokenizer.decode([i]))
    return ends


def documents(separators: Flags) -> list[Span]:
    """Documents: non-empty ranges between separators."""
    edges = [-1, *np.flatnonzero(separators).tolist(), len(separators)]
    pairs = [(left + 1, right) for left, right in pairwise(edges)]
    return [(start, stop) for start, stop in pairs if start < stop]


def short_spans(separators: Flags, share: float, mean: float, rng: np.random.Generator) -> list[Span]:
    """Short spans, Poisson lengths, until int(share * tokens) of each document are masked; a token between any two.

    Each arrangement of the spans is equally likely.

    Args:
        separators: (N,) document separators.
        share: of the tokens.
        mean: of the Poisson distribution, lambda.
    """
    spans: list[Span] = []
    weights = span_lengths(mean)
    for start, stop in documents(separators):
        size, lengths = stop - start, list[int]()
        while sum(lengths) < int(share * size):
            length = int(rng.choice(LONGEST, p=weights)) + 1
            if sum(lengths) + length + len(lengths) > size:  # each but the last needs a token after it
                break
            lengths.append(length)
        free = size - sum(lengths)
        # m spans between `free` tokens, no two adjacent: m of the free + 1 gaps.
        gaps = np.sort(rng.choice(free + 1, size=len(lengths), replace=False)).tolist()
        done = 0
        for gap, length in zip(gaps, lengths, strict=True):
            spans.append((start + gap + done, start + gap + done + length))
            done += length
    return spans


def one_token(separators: Flags, rng: np.random.Generator) -> list[Span]:
    """One-token span, for a text too short for more. A window of separators alone gives one of these."""
    positions = np.flatnonzero(~separators)
    at = int(rng.choice(positions)) if len(positions) else 0
    return [(at, at + 1)]


def sentence_spans(ends: Flags, separators: Flags, share: float, rng: np.random.Generator) -> list[Span]:
    """Sentence spans: random whole sentences until `share` of the tokens are masked.

    Args:
        ends: (N,) sentence-final tokens.
        separators: (N,) document separators; a document ends its last sentence, too.
        share: of the tokens.
    """
    sentences = []
    for start, stop in documents(separators):
        # Text before the first end may have begun before this window, text after the last may go on.
        edges = [start] * (start > 0) + (start + 1 + np.flatnonzero(ends[start:stop])).tolist()
        edges += [stop] * (stop < len(ends) and stop not in edges)
        sentences += list(pairwise(edges))
    chosen: list[Span] = []
    covered = 0
    for i in rng.permutation(len(sentences)).tolist():
        if covered >= share * len(ends):
            break
        chosen.append(sentences[i])
        covered += sentences[i][1] - sentences[i][0]
    return sorted(chosen)


def long_span(separators: Flags, least: float, suffix: float, rng: np.random.Generator) -> list[Span]:
    """Long span in the longest document, of a length uniform from `least` of it to all but two tokens.

    Args:
        separators: (N,) document separators.
        least: share of the document.
        suffix: the probability that it ends with the document; else its position is uniform.
    """
    start, stop = max(documents(separators), key=lambda span: span[1] - span[0], default=(0, 0))
    size = stop - start
    if size < 4:
        return []
    length = int(rng.integers(min(max(1, int(least * size)), size - 2), size - 2, endpoint=True))
    if rng.random() >= suffix:
        stop = start + length + int(rng.integers(size - length, endpoint=True))
    return [(stop - length, stop)]
