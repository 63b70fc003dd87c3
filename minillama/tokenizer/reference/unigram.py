"""The unigram language model: a text's best cut is the one whose pieces are most probable together.

Kudo 2018 (arXiv 1804.10959). P(cut) is the product of its pieces' probabilities, which sum to 1 over the
vocabulary. Training starts from a large vocabulary, estimates probabilities by expectation maximization, and
drops the pieces whose loss costs least, until the size is right.
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

__all__ = ["Unigram", "seed_vocabulary", "train"]

UNKNOWN_PENALTY = 10.0  # a character that is no piece costs this many nats more than the rarest piece


class Unigram:
    """Pieces with log probabilities.

    Args:
        scores: piece -> ln p.
    """

    def __init__(self, scores: Mapping[str, float]) -> None:
        if not scores:
            raise InputError("a vocabulary without pieces")
        self.scores = dict(scores)
        self.longest = max(map(len, self.scores))
        self.unknown = min(self.scores.values()) - UNKNOWN_PENALTY

    def edges(self, text: str) -> Iterator[tuple[int, int, float]]:
        """The lattice: (start, end, ln p) of every piece that stands in the text, by ascending end.

        A character that is no piece is an edge too, at the unknown score.
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
        """The most probable cut (Viterbi). Of equals the one whose last piece is longest."""
        best, start_of = [0.0] + [-math.inf] * len(text), [0] * (len(text) + 1)
        for start, end, score in self.edges(text):
            if best[start] + score > best[end]:
                best[end], start_of[end] = best[start] + score, start
        cut, end = [], len(text)
        while end:
            cut.append(text[start_of[end] : end])
            end = start_of[end]
        return cut[::-1]

    def n_best(self, text: str, count: int) -> list[tuple[list[str], float]]:
        """The `count` most probable cuts with their ln P, best first.

        The recursion of `encode` with a list instead of one entry at each place.
        """
        best: list[list[tuple[float, int, int]]] = [[(0.0, 0, 0)]] + [[] for _ in text]  # (ln P, start, its rank)
        for start, end, score in self.edges(text):
            best[end] += [(value + score, start, rank) for rank, (value, _, _) in enumerate(best[start])]
            best[end] = heapq.nlargest(count, best[end], key=lambda entry: (entry[0], -entry[1]))
        cuts = []
        for rank, (value, _, _) in enumerate(best[-1]):
            cut, end, at = [], len(text), rank
            while end:
                _, start, at_start = best[end][at]
                cut.append(text[start:end])
                end, at = start, at_start
            cuts.append((cut[::-1], value))
        return cuts

    def log_partition(self, text: str, alpha: float = 1.0) -> float:
        """Ln of the sum of P^alpha over all cuts."""
        return _forward(len(text), self.edges(text), alpha)[-1]

    def sample(self, text: str, alpha: float, generator: random.Random) -> list[str]:
        """A cut drawn with probability P^alpha / Z: forward filtering, backward sampling.

        Args:
            text: what to cut.
            alpha: 0 draws all cuts alike, 1 as the model has them, more sharpens towards the best.
            generator: source of the random numbers.
        """
        edges = list(self.edges(text))
        forward, ending = _forward(len(text), edges, alpha), defaultdict(list)
        for start, end, score in edges:
            ending[end].append((start, forward[start] + alpha * score))
        cut, end = [], len(text)
        while end:
            starts, logs = zip(*ending[end], strict=True)
            start = generator.choices(starts, [math.exp(log - forward[end]) for log in logs])[0]
            cut.append(text[start:end])
            end = start
        return cut[::-1]

    def expected_counts(self, text: str, weight: float = 1.0) -> tuple[dict[str, float], float]:
        """How often each piece occurs in a cut of the text on average, times the weight; and ln Z.

        Forward times backward over the lattice: the E step.
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
    """Every character, and the substrings with the greatest count times length.

    Args:
        words: word -> count.
        size: substrings at most, besides the characters.
        longest: characters of a substring at most.
        source: where substrings come from. `suffixes`: all that occur twice and do not always go on in the same
            way, from a suffix array (google/sentencepiece, src/unigram_model_trainer.cc, MakeSeedSentencePieces);
            `bpe`: the pieces of a byte-pair encoding of `size` merges.

    Returns:
        Piece -> ln of its share of all counts.

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

    Those that are always followed by the same character are left out: the others are the inner nodes of the
    suffix tree. Sorted suffixes that share a prefix stand together, so a stack
    of the prefixes that are still open finds each with its count in one pass.
    """
    suffixes = sorted((word[i : i + longest], count) for word, count in words.items() for i in range(len(word)))
    counts: dict[str, int] = {}
    open_: list[list[int]] = []  # [length, count]
    before = ""
    for suffix, count in [*suffixes, ("", 0)]:
        shared = next((i for i, (a, b) in enumerate(zip(before, suffix, strict=False)) if a != b), None)
        shared = min(len(before), len(suffix)) if shared is None else shared
        closed = 0
        while open_ and open_[-1][0] > shared:
            length, own = open_.pop()
            closed += own
            if length > 1 and closed > 1:
                counts[before[:length]] = closed
        if closed and open_ and open_[-1][0] == shared:
            open_[-1][1] += closed
        elif closed and shared:
            open_.append([shared, closed])
        if open_ and open_[-1][0] == len(suffix):
            open_[-1][1] += count
        else:
            open_.append([len(suffix), count])
        before = suffix
    return counts


def train(
    words: Mapping[str, int],
    vocab_size: int,
    seed: Mapping[str, float] | None = None,
    shrinking: float = 0.75,
    sub_iterations: int = 2,
) -> Unigram:
    """Learn pieces and probabilities.

    Args:
        words: word -> count.
        vocab_size: pieces; every character of the words is kept.
        seed: piece -> ln p to start from; `seed_vocabulary` unless given.
        shrinking: the share of pieces that survives a pruning.
        sub_iterations: rounds of expectation maximization between two prunings.

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
    """One round: expected counts, and new probabilities by digamma(count) - digamma(sum).

    The digamma of a variational Bayes with a vanishing prior weighs rare pieces down; those expected less
    than half a time go (google/sentencepiece, src/unigram_model_trainer.cc, RunMStep).
    """
    counts: defaultdict[str, float] = defaultdict(float)
    for word, repeats in words.items():
        for piece, value in model.expected_counts(word, repeats)[0].items():
            counts[piece] += value
    kept = {p: max(c, 0.5) for p, c in counts.items() if c >= 0.5 or p in required}
    total = digamma(sum(kept.values()))
    return Unigram({piece: digamma(count) - total for piece, count in kept.items()})


def _prune(model: Unigram, words: Mapping[str, int], required: set[str], size: int) -> Unigram:
    """Keep the pieces without which the best cuts would lose most; characters in any case."""
    uses: Counter[str] = Counter()
    for word, repeats in words.items():
        for piece in model.encode(word):
            uses[piece] += repeats
    losses: dict[str, float] = {}
    for piece in model.scores:
        if piece in required:
            continue
        cuts = model.n_best(piece, 2)
        if cuts[0][0] != [piece]:  # its own best cut is another: nobody misses it
            losses[piece] = 0.0
        elif len(cuts) > 1:
            losses[piece] = uses[piece] * (cuts[0][1] - cuts[1][1])
    room = size - len(required & set(model.scores))
    kept = required.union(heapq.nlargest(room, losses, key=lambda piece: losses[piece]))
    return Unigram({piece: score for piece, score in model.scores.items() if piece in kept})


def digamma(x: float) -> float:
    """The derivative of ln Gamma: recurrence up to 7, then the asymptotic series (Abramowitz and Stegun 6.3.18)."""
    value = 0.0
    while x < 7:
        value -= 1 / x
        x += 1
    square = 1 / (x * x)
    return value + math.log(x) - 0.5 / x - square * (1 / 12 - square * (1 / 120 - square / 252))


def _forward(length: int, edges: Iterable[tuple[int, int, float]], alpha: float = 1.0) -> list[float]:
    """Ln of the sum of P^alpha over all cuts of the first 0, 1, ... characters."""
    forward = [0.0] + [-math.inf] * length
    for start, end, score in edges:
        forward[end] = _log_add(forward[end], forward[start] + alpha * score)
    return forward


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
