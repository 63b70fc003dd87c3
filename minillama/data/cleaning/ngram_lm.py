"""n-gram language model: interpolated modified Kneser-Ney (Chen and Goodman 1998), in numpy.

Discounts D_k = k - (k + 1) Y n_{k+1} / n_k with Y = n_1 / (n_1 + 2 n_2), for counts k = 1, 2 and 3 or more. Orders
below the highest count left extensions, but for n-grams that begin with <s>. As KenLM's lmplz has it (Heafield 2013),
the unigrams are interpolated with a uniform distribution, which is what <unk> gets. An n-gram is known by the pair
(number of its first n - 1 tokens, last token), and a sorted array of these pairs is the whole index.
"""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from minillama.data.archives import open_file
from minillama.errors import InputError
from minillama.files import reading, replace_file

UNK, BOS, EOS = 0, 1, 2
_BEGIN = ("<unk>", "<s>", "</s>")
_DISCOUNTS = np.array([0.0, 0.5, 1.0, 1.5])  # where a text has too few n-grams to estimate them, as lmplz's fallback
Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class NgramLM:
    """Backoff model.

    Args:
        tokens: names of the tokens; <unk>, <s> and </s> are the first three.
        keys: per order from 2 on, sorted numbers of n-grams: number of the prefix * len(tokens) + last token.
        log10s: per order, log10 probabilities.
        backoffs: per order but the last, log10 weights.
    """

    tokens: tuple[str, ...]
    keys: list[Ids]
    log10s: list[Floats]
    backoffs: list[Floats]

    @property
    def order(self) -> int:
        """N of the longest n-grams."""
        return len(self.log10s)

    def check(self) -> None:
        """Check tokens and sizes of the tables.

        Raises:
            ValueError: they contradict each other.
        """
        sizes = [(len(self.tokens),), *((len(keys),) for keys in self.keys)]
        tables = [[values.shape for values in table] for table in (self.log10s, self.backoffs)]
        if tables != [sizes, sizes[:-1]] or not all(isinstance(token, str) for token in self.tokens):
            raise ValueError(f"tables of {tables} for {sizes}")

    @classmethod
    def train(
        cls, sentences: Iterable[Sequence[int]], tokens: Sequence[str], order: int = 5, min_count: int = 1
    ) -> NgramLM:
        """Estimate a model.

        Args:
            sentences: token ids from 3 on, as numbered in `tokens`; each gets <s> and </s>.
            tokens: all names, the three of the beginning included.
            order: n.
            min_count: n-grams from order 3 on that are rarer are left out.

        Raises:
            InputError: no sentences.
        """
        ids = np.array([i for sentence in sentences for i in (BOS, *sentence, EOS)], np.int64)
        if not len(ids):
            raise InputError("there is no text to train a language model on")
        size = len(tokens)
        found = [_Order(1, np.arange(size), ids, np.bincount(ids, minlength=size))]
        for n in range(2, order + 1):
            found.append(found[-1].longer(ids, size, min_count if n > 2 else 1))
        for lower, higher in pairwise(found):
            lower.count_extensions(higher, ids)
        counts = found[0].counts.astype(float)
        counts[[UNK, BOS]] = 0
        discount = _discounts(counts)
        lower_p = (counts - discount + discount.sum() / (size - 1)) / counts.sum()  # uniform over all but <s>
        lower_p[BOS] = 1.0
        log10s, backoffs = [np.log10(lower_p).astype(np.float32)], []
        for one, below in zip(found[1:], found, strict=False):
            prefix, counts = one.keys // size, one.counts.astype(float)
            discount = _discounts(counts)
            totals, rest = (np.bincount(prefix, values, len(below.keys)) for values in (counts, discount))
            gamma = np.divide(rest, totals, out=np.ones(len(totals)), where=totals > 0)
            lower_p = (counts - discount) / totals[prefix] + gamma[prefix] * lower_p[one.suffixes]
            log10s.append(np.log10(lower_p).astype(np.float32))
            backoffs.append(np.log10(np.maximum(gamma, 1e-99)).astype(np.float32))
        return cls(tuple(tokens), [one.keys for one in found[1:]], log10s, backoffs)

    def scores(self, ids: Ids) -> NDArray[np.float64]:
        """log10 probability of each token after those before it, of many sentences at once.

        Args:
            ids: (T,) tokens; each sentence from <s> to </s>. No n-gram reaches over <s>, which scores 0.
        """
        score, longest, number = self.log10s[0][ids].astype(np.float64), np.ones(len(ids), np.int64), ids
        contexts = []
        for n, (keys, log10s) in enumerate(zip(self.keys, self.log10s[1:], strict=True), 2):
            before = np.concatenate([[-1], number[:-1]])
            contexts.append(before)
            at = np.searchsorted(keys, before * len(self.tokens) + ids)
            at[at == len(keys)] = 0
            is_known = (before >= 0) & (keys[at] == before * len(self.tokens) + ids if len(keys) else False)
            number = np.where(is_known, at, -1)
            score[is_known], longest[is_known] = log10s[at[is_known]], n
        for n, (weights, before) in enumerate(zip(self.backoffs, contexts, strict=True), 1):
            backs_off = (before >= 0) & (longest <= n)
            score[backs_off] += weights[before[backs_off]]
        score[ids == BOS] = 0
        return score

    def score(self, sentence: Sequence[int]) -> float:
        """log10 probability of a sentence and its end."""
        return float(self.scores(np.array([BOS, *sentence, EOS])).sum())

    def write_arpa(self, path: Path) -> None:
        """Write an ARPA file, which KenLM reads."""

        def write(temporary: Path) -> None:
            with temporary.open("wb") as raw:
                packed = gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) if path.suffix == ".gz" else raw
                with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file:
                    self._write(file)

        replace_file(path, write)

    def _write(self, file: TextIO) -> None:
        file.write("\\data\\\n")
        for n, log10s in enumerate(self.log10s, 1):
            file.write(f"ngram {n}={len(log10s)}\n")
        names = list(self.tokens)
        for n in range(1, self.order + 1):
            if n > 1:
                prefix, last = np.divmod(self.keys[n - 2], len(self.tokens))
                names = [f"{names[p]} {self.tokens[i]}" for p, i in zip(prefix.tolist(), last.tolist(), strict=True)]
            file.write(f"\n\\{n}-grams:\n")
            values = [f"{value:.7g}" for value in self.log10s[n - 1].tolist()]
            ends = (
                [f"\t{value:.7g}" for value in self.backoffs[n - 1].tolist()] if n < self.order else [""] * len(values)
            )
            file.writelines(f"{value}\t{name}{end}\n" for value, name, end in zip(values, names, ends, strict=True))
        file.write("\n\\end\\\n")

    @classmethod
    def read_arpa(cls, path: Path) -> NgramLM:
        """Model of an ARPA file, ours or another's.

        Raises:
            InputError: the file is damaged, with the line.
        """
        with reading(path), open_file(path) as raw:
            lines = enumerate(io.TextIOWrapper(raw, encoding="utf-8", newline="\n"), 1)
            try:
                return cls._read(lines)
            except (ValueError, LookupError, StopIteration, EOFError) as error:
                where, found = f"{path}, before line {next(lines, (0, ''))[0]}", f"{type(error).__name__}: {error}"
                raise InputError("this is not an ARPA file", where=where, found=found) from None

    @classmethod
    def _read(cls, lines: Iterator[tuple[int, str]]) -> NgramLM:
        counts: list[int] = []
        for _, line in lines:
            if line.startswith("ngram "):
                counts.append(int(line.partition("=")[2]))
            elif counts:
                break
        if not counts:
            raise ValueError("no counts at the beginning")
        known = {name: i for i, name in enumerate(_BEGIN)} | {"<UNK>": UNK}
        tokens, keys, log10s, backoffs = list(_BEGIN), list[Ids](), list[Floats](), list[Floats]()
        numbers: dict[tuple[int, ...], int] = {}
        for n, count in enumerate(counts, 1):
            while not next(lines)[1].startswith(f"\\{n}-grams:"):
                pass
            rows: dict[tuple[int, ...], tuple[float, float]] = {(i,): (-100.0, 0.0) for i in range(3) if n == 1}
            for _ in range(count):
                value, *words = re.split("[ \t]+", next(lines)[1].strip(" \t\r\n"))
                if n == 1 and words[0] not in known:
                    known[words[0]] = len(tokens)
                    tokens.append(words[0])
                gram = tuple(known[word] for word in words[:n])
                rows[gram] = float(value), float(words[n]) if len(words) > n else 0.0
            grams = list(rows)
            key = np.array([numbers.get(gram[:-1], 0) * len(tokens) + gram[-1] for gram in grams], np.int64)
            order = np.argsort(key)
            numbers = {grams[i]: rank for rank, i in enumerate(order.tolist())}
            table = np.array(list(rows.values()), np.float32).reshape(-1, 2)[order]
            keys.append(key[order])
            log10s.append(table[:, 0])
            backoffs.append(table[:, 1])
        return cls(tuple(tokens), keys[1:], log10s, backoffs[:-1])


class _Order:
    """n-grams of one order in a text: keys, number of the one that ends at each position (-1: none), counts."""

    def __init__(self, n: int, keys: Ids, at: Ids, counts: Ids, suffixes: Ids | None = None) -> None:
        self.n, self.keys, self.at, self.counts = n, keys, at, counts
        self.suffixes = np.empty(0, np.int64) if suffixes is None else suffixes

    def longer(self, ids: Ids, size: int, min_count: int) -> _Order:
        """n-grams one token longer: a known prefix and a token; none reaches over <s>."""
        before = np.concatenate([[-1], self.at[:-1]])
        valid = np.flatnonzero((before >= 0) & (ids != BOS))
        keys, inverse, counts = np.unique(before[valid] * size + ids[valid], return_inverse=True, return_counts=True)
        kept, at = counts >= min_count, np.full(len(ids), -1, np.int64)
        at[valid] = np.where(kept, np.cumsum(kept) - 1, -1)[inverse]
        ends = at >= 0
        suffixes = np.zeros(int(kept.sum()), np.int64)
        suffixes[at[ends]] = self.at[ends]  # what ends at the same position and is one token shorter
        return _Order(self.n + 1, keys[kept], at, counts[kept], suffixes)

    def count_extensions(self, higher: _Order, ids: Ids) -> None:
        """Number of left extensions in place of occurrences, but for n-grams that begin with <s>."""
        ends = np.flatnonzero(ids == BOS) + self.n - 1
        ends = self.at[ends[ends < len(ids)]]
        counts = np.bincount(higher.suffixes, minlength=len(self.keys))
        counts[ends[ends >= 0]] = self.counts[ends[ends >= 0]]
        self.counts = counts


def _discounts(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Discount of each n-gram, by its count."""
    n = np.array([(counts == k).sum() for k in range(5)], float)
    found = _DISCOUNTS
    if n[1:5].all():
        k = np.arange(4)
        estimate = k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[1:5] / np.maximum(n[:4], 1)
        if ((estimate[1:] >= 0) & (estimate[1:] <= k[1:])).all():
            found = np.array([0, *estimate[1:]])
    return found[np.minimum(counts, 3).astype(int)]
