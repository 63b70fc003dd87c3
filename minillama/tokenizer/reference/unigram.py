"""Unigram language model segmentation: the most probable sequence of token pieces.

Kudo 2018 (arXiv 1804.10959). P(segmentation) is the product of its token pieces' probabilities, which sum to 1
over the vocabulary. Training starts from a large seed vocabulary, estimates probabilities by expectation
maximization, and prunes the token pieces of least likelihood loss, down to the vocabulary size.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Literal

from minillama.errors import InputError
from minillama.tokenizer.reference import bpe

UNKNOWN_PENALTY = 10.0  # nats that an unknown character costs more than the rarest token piece


class Unigram:
    """Unigram language model; the scores are token piece -> ln p."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        if not scores:
            raise InputError("the vocabulary is empty")
        self.scores = dict(scores)
        self.longest = max(map(len, self.scores))
        self.unknown = min(self.scores.values()) - UNKNOWN_PENALTY

    def edges(self, text: str) -> Iterator[tuple[int, int, float]]:
        """Lattice: (start, end, ln p) of every token piece in the text, by ascending end.

        Unknown characters are edges too, at the unknown score.
        """
        find = self.scores.get
        for end in range(1, len(text) + 1):
            for start in range(max(0, end - self.longest), end):
                score = find(text[start:end])
                if score is not None:
                    yield start, end, score
                elif start == end - 1:
                    yield start, end, self.unknown

    def encode(self, text: str) -> list[str]:
        """Viterbi segmentation, the most probable. Ties: the longest last token piece."""
        best, start_of = [0.0] + [-math.inf] * len(text), [0] * (len(text) + 1)
        for start, end, score in self.edges(text):
            if best[start] + score > best[end]:
                best[end], start_of[end] = best[start] + score, start
        segments, end = [], len(text)
        while end:
            segments.append(text[start_of[end] : end])
            end = start_of[end]
        return segments[::-1]

    def n_best(self, text: str, count: int) -> list[tuple[list[str], float]]:
        """N-best segmentations with their ln P, best first.

        Viterbi with a list instead of one entry per position.
        """
        best: list[list[tuple[float, int, int]]] = [[(0.0, 0, 0)]] + [[] for _ in text]  # (ln P, start, its rank)
        for start, end, score in self.edges(text):
            best[end] += [(value + score, start, rank) for rank, (value, _, _) in enumerate(best[start])]
            best[end] = heapq.nlargest(count, best[end], key=lambda entry: (entry[0], -entry[1]))
        segmentations = []
        for rank, (value, _, _) in enumerate(best[-1]):
            segments, end, at = [], len(text), rank
            while end:
                _, start, at_start = best[end][at]
                segments.append(text[start:end])
                end, at = start, at_start
            segmentations.append((segments[::-1], value))
        return segmentations

    def log_partition(self, text: str) -> float:
        """Log partition function: ln of the sum of P over all segmentations."""
        return _forward(len(text), self.edges(text))[-1]

    def sample(self, text: str, alpha: float, generator: random.Random) -> list[str]:
        """Segmentation sampled with probability P^alpha / Z: forward filtering, backward sampling.

        `alpha` is an inverse temperature: 0 is uniform, 1 the model, more sharpens towards the best.
        """
        edges = list(self.edges(text))
        forward, ending = _forward(len(text), edges, alpha), defaultdict(list)
        for start, end, score in edges:
            ending[end].append((start, forward[start] + alpha * score))
        segments, end = [], len(text)
        while end:
            starts, logs = zip(*ending[end], strict=True)
            start = generator.choices(starts, [math.exp(log - forward[end]) for log in logs])[0]
            segments.append(text[start:end])
            end = start
        return segments[::-1]

    def expected_counts(self, text: str, weight: float = 1.0) -> tuple[dict[str, float], float]:
        """Expected count per token piece, times the weight; and ln Z.

        The E step: forward-backward over the lattice.
        """
        edges = list(self.edges(text))
        forward = _forward(len(text), edges)
        backward = [-math.inf] * len(text) + [0.0]
        for start, end, score in reversed(edges):
            backward[start] = _log_add(backward[start], backward[end] + score)
        counts: defaultdict[str, float] = defaultdict(float)
        for start, end, score in edges:
            counts[text[start:end]] += weight * math.exp(forward[start] + score + backward[end] - forward[-1])
        return counts, forward[-1]


def seed_vocabulary(
    words: Mapping[str, int], size: int, longest: int = 16, source: Literal["suffixes", "bpe"] = "suffixes"
) -> dict[str, float]:
    """Seed vocabulary: every character, and the substrings of greatest count times length.

    Args:
        size: substrings at most, besides the characters.
        longest: characters per substring at most.
        source: of substrings. `suffixes`: all that occur twice and have more than one continuation,
            from the suffix tree (google/sentencepiece, src/unigram_model_trainer.cc, MakeSeedSentencePieces);
            `bpe`: the token pieces of BPE with `size` merges.

    Returns:
        Token piece -> ln of its share of all counts.

    Raises:
        InputError: an unknown source.
    """
    if source not in ("suffixes", "bpe"):
        raise InputError("unknown source", where="source", found=source, expected="suffixes or bpe")
    if source == "suffixes":
        substrings = _repeats(words, longest)
    else:
        joined = {left + right for left, right in bpe.train(words, size, min_count=2)}
        counts = Counter[str]()
        for word, count in words.items():
            for start, end in combinations(range(len(word) + 1), 2):
                if end - start <= longest and word[start:end] in joined:
                    counts[word[start:end]] += count
        substrings = dict(counts)
    chars = Counter[str]()
    for word, count in words.items():
        for char in word:
            chars[char] += count
    frequent = [(count * len(piece), piece) for piece, count in substrings.items()]
    chosen = {piece: value for value, piece in heapq.nlargest(size, frequent)} | dict(chars)
    total = math.log(sum(chosen.values()))
    return {piece: math.log(value) - total for piece, value in chosen.items()}


def _repeats(words: Mapping[str, int], longest: int) -> dict[str, int]:
    """Counts of the substrings of 2 to `longest` characters that occur twice or more.

    Those with a single continuation are omitted: the others are the inner nodes of the suffix tree.
    """
    counts: dict[str, int] = {}

    def descend(suffixes: list[tuple[str, int]], depth: int) -> None:
        """Suffixes with a common prefix of `depth` characters."""
        total = sum(count for _, count in suffixes)
        if total < 2:
            return
        branches: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        for suffix, count in suffixes:
            branches[suffix[depth : depth + 1]].append((suffix, count))
        if depth > 1 and (len(branches) > 1 or "" in branches):
            counts[suffixes[0][0][:depth]] = total
        branches.pop("", None)
        for branch in branches.values():
            descend(branch, depth + 1)

    descend([(word[i : i + longest], count) for word, count in words.items() for i in range(len(word))], 0)
    return counts


def train(
    words: Mapping[str, int],
    vocab_size: int,
    seed: Mapping[str, float] | None = None,
    shrinking: float = 0.75,
    sub_iterations: int = 2,
) -> Unigram:
    """Unigram training: EM and pruning.

    Args:
        vocab_size: token pieces; every character of the words is kept.
        seed: initial token piece -> ln p; default `seed_vocabulary`.
        shrinking: the share of token pieces kept per pruning.
        sub_iterations: EM iterations per pruning.

    Raises:
        InputError: more characters than `vocab_size`.
    """
    required = {char for word in words for char in word}
    if len(required) > vocab_size:
        found, expected = f"{len(required)} characters", f"at most {vocab_size}"
        raise InputError("the characters alone do not fit", where="vocab_size", found=found, expected=expected)
    model = Unigram(seed or seed_vocabulary(words, 100 * vocab_size))
    goal = max(vocab_size, len(required))
    while True:
        for _ in range(sub_iterations):
            model = _maximize(model, words, required)
        if len(model.scores) <= goal:
            return model
        model = _prune(model, words, required, max(goal, int(shrinking * len(model.scores))))


def _maximize(model: Unigram, words: Mapping[str, int], required: set[str]) -> Unigram:
    """EM iteration: expected counts, and ln p = digamma(count) - digamma(sum).

    The digamma, of variational Bayes with a vanishing prior, weighs rare token pieces down; expected counts below
    0.5 are pruned (google/sentencepiece, src/unigram_model_trainer.cc, RunMStep).
    """
    counts: defaultdict[str, float] = defaultdict(float)
    for word, repeats in words.items():
        for piece, value in model.expected_counts(word, repeats)[0].items():
            counts[piece] += value
    kept = {p: max(c, 0.5) for p, c in counts.items() if c >= 0.5 or p in required}
    total = digamma(sum(kept.values()))
    return Unigram({piece: digamma(count) - total for piece, count in kept.items()})


def _prune(model: Unigram, words: Mapping[str, int], required: set[str], size: int) -> Unigram:
    """Keep the token pieces of greatest likelihood loss, and all characters."""
    uses: Counter[str] = Counter()
    for word, repeats in words.items():
        for piece in model.encode(word):
            uses[piece] += repeats
    losses: dict[str, float] = {}
    for piece in model.scores:
        if piece in required:
            continue
        segmentations = model.n_best(piece, 2)
        if segmentations[0][0] != [piece]:  # its own best segmentation is another: no loss
            losses[piece] = 0.0
        elif len(segmentations) > 1:
            losses[piece] = uses[piece] * (segmentations[0][1] - segmentations[1][1])
    count = size - len(required & set(model.scores))
    kept = required.union(heapq.nlargest(count, losses, key=lambda piece: losses[piece]))
    return Unigram({piece: score for piece, score in model.scores.items() if piece in kept})


def digamma(x: float) -> float:
    """Digamma function: recurrence up to 7, then the asymptotic series (Abramowitz and Stegun 6.3.18)."""
    value = 0.0
    while x < 7:
        value -= 1 / x
        x += 1
    square = 1 / (x * x)
    return value + math.log(x) - 0.5 / x - square * (1 / 12 - square * (1 / 120 - square / 252))


def _forward(length: int, edges: Iterable[tuple[int, int, float]], alpha: float = 1.0) -> list[float]:
    """Forward algorithm: ln of the sum of P^alpha over all segmentations of the first 0, 1, ... characters."""
    forward = [0.0] + [-math.inf] * length
    for start, end, score in edges:
        forward[end] = _log_add(forward[end], forward[start] + alpha * score)
    return forward


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
