"""Instruction data set: conversations as token ids and loss weights, in rows, in a training and a held-out split."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minillama.data.examples import by_length, drawn, too_few
from minillama.data.packing import best_fit
from minillama.data.skipped import Skipped
from minillama.errors import InputError

Packing = Literal["best-fit", "wrap", "none"]
MULTIPLE = 32  # rows of single conversations are padded to a multiple of it, so that compiled code meets few shapes


@dataclass(frozen=True)
class Example:
    """Tokenized conversation.

    Args:
        ids: (N,) token ids.
        weights: (N,) loss weights of these tokens as targets; 0 for what is not trained.
        prompt: ids up to the first answer, for a sample.
        where: file and record.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    prompt: Sequence[int] = ()
    where: str = ""

    @classmethod
    def of(cls, ids: Sequence[int], weights: Sequence[float], where: str = "") -> Example:
        """Example of lists."""
        prompt = ids[: next((i for i, weight in enumerate(weights) if weight), 0)]
        return cls(np.asarray(ids, np.int32), np.asarray(weights, np.float32), prompt, where)


class Rows(NamedTuple):
    """Batch of rows; B rows of T slots.

    Args:
        tokens: (B, T) input ids.
        targets: (B, T) target ids.
        weights: (B, T) loss weights; 0 in padding.
        documents: (B, T) conversation ids within a row, None where attention is not confined to them.
        positions: (B, T) position ids within conversations, None as well.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    documents: NDArray[np.int64] | None
    positions: NDArray[np.int64] | None


def collate(rows: Sequence[Sequence[Example]], length: int) -> Rows:
    """Rows of whole conversations, isolated from one another: each predicts within itself, from position 0.

    Args:
        rows: conversations of each row, of N tokens in N - 1 slots.
        length: T. Padding is a conversation of its own.
    """
    shape = len(rows), length
    tokens, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weights, documents = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    positions = np.tile(np.arange(length), (len(rows), 1))
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples, 1):
            stop = start + len(example.ids) - 1
            tokens[row, start:stop], targets[row, start:stop] = example.ids[:-1], example.ids[1:]
            weights[row, start:stop] = example.weights[1:]
            documents[row, start:], positions[row, start:] = number - 1, np.arange(length - start)
            start = stop
        documents[row, start:], positions[row, start:] = len(examples), np.arange(length - start)
    if all(len(examples) == 1 for examples in rows):  # causal attention alone keeps padding out
        return Rows(tokens, targets, weights, None, None)
    return Rows(tokens, targets, weights, documents, positions)


@dataclass(frozen=True)
class Instructions:
    """Instruction data set.

    Args:
        train: training split, of at most `context` + 1 tokens each.
        val: held-out split.
        context: T, slots per row.
        packing: `best-fit`, whole conversations, isolated from one another, as many as fit a row; `wrap`, all of them
            joined and cut into rows (LLaMA 2, arXiv 2307.09288, §3.1), but for rows
            without a trained token; `none`, one per row.
        fingerprint: SHA-256 of ids, weights and the split.
        skipped: records left out.
        stop_ids: special tokens that end an answer.
    """

    train: Sequence[Example]
    val: Sequence[Example]
    context: int
    packing: Packing = "best-fit"
    fingerprint: str = ""
    skipped: Skipped = field(default_factory=Skipped)
    stop_ids: frozenset[int] = frozenset()
    _epochs: dict[tuple[int, int], tuple[NDArray[np.int32], NDArray[np.float32], list[int]]] = field(
        default_factory=dict
    )
    _ends: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        train: Sequence[Example],
        val: Sequence[Example],
        context: int,
        packing: Packing,
        skipped: Skipped | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Instructions:
        """Data set of two splits, with its fingerprint.

        Raises:
            InputError: an empty split.
        """
        if not (train and val):
            raise too_few("conversations", train, val, skipped or Skipped())
        digest = sha256(f"{packing} {context}".encode())
        for split in (train, val):
            digest.update(f"{len(split)}".encode())
            for example in split:
                digest.update(example.ids.tobytes() + example.weights.tobytes())
        return cls(train, val, context, packing, digest.hexdigest(), skipped or Skipped(), stop_ids)

    def rows(self, seed: int, step: int, count: int) -> Rows:
        """Rows of a step, without replacement within an epoch: a pure function of the arguments."""
        if self.packing == "wrap":
            return self._wrapped(seed, step, count)
        rows = [[self.train[i] for i in row] for row in self._chosen(seed, step, count)]
        longest = max(len(example.ids) for row in rows for example in row) - 1
        padded = min(self.context, -(-longest // MULTIPLE) * MULTIPLE)
        return collate(rows, self.context if self.packing == "best-fit" else padded)

    def where(self, seed: int, step: int, count: int, chosen: Sequence[int]) -> list[str]:
        """File and record of the chosen rows of a step."""
        if self.packing == "wrap":
            return [f"row {row} of all conversations of an epoch, joined" for row in chosen]
        rows = self._chosen(seed, step, count)
        return [" and ".join(self.train[i].where for i in rows[row]) for row in chosen]

    def held_out(self, count: int, limit: int = 0) -> Iterator[Rows]:
        """Held-out conversations, one per row as `none` has them, `count` rows at a time.

        Args:
            count: rows.
            limit: approximate number of tokens in all, of evenly spaced conversations; 0: all.
        """
        total = sum(len(example.ids) for example in self.val)
        every = max(1, total // limit) if limit else 1
        for part in by_length(self.val, lambda example: len(example.ids), count, every):
            yield collate([[example] for example in part], len(part[-1].ids) - 1)

    def _plan(self) -> list[list[int]]:
        """Conversations of each row, the same in every epoch."""
        if self.packing == "none":
            return [[i] for i in range(len(self.train))]
        return _packed(tuple(len(example.ids) - 1 for example in self.train), self.context)

    def _chosen(self, seed: int, step: int, count: int) -> list[list[int]]:
        plan = self._plan()
        return [plan[i] for i in drawn("conversations", seed, step, count, len(plan))]

    def _wrapped(self, seed: int, step: int, count: int) -> Rows:
        rows = [self._row(seed, sample) for sample in range(step * count, (step + 1) * count)]
        ids, weights = (np.stack(parts) for parts in zip(*rows, strict=True))
        return Rows(ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64), weights[:, 1:], None, None)

    def _row(self, seed: int, sample: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and weights of a row, T + 1 each; rows without a trained token are no part of their epoch.

        Raises:
            InputError: there is no other row.
        """
        ends = self._ends.setdefault(seed, [0])  # rows up to the end of each epoch, whose number depends on its order
        while ends[-1] <= sample:
            if len(ends) == 100 and not ends[-1]:
                what, fix = "no row of joined conversations has a trained token", "set data.packing = 'best-fit'"
                raise InputError(what, where="data.packing", found=f"wrap, rows of {self.context} tokens", fix=fix)
            ends.append(ends[-1] + len(self._epoch(seed, len(ends) - 1)[2]))
        epoch = bisect_right(ends, sample) - 1
        ids, weights, starts = self._epoch(seed, epoch)
        start = starts[sample - ends[epoch]]
        part = slice(start, start + self.context + 1)
        missing = self.context + 1 - len(ids[part])  # less than one row in all
        return np.pad(ids[part], (0, missing)), np.pad(weights[part], (0, missing))

    def _epoch(self, seed: int, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.float32], list[int]]:
        """All conversations of an epoch, joined, and the places where its rows begin."""
        if (seed, epoch) not in self._epochs:
            ids, weights = self._joined(seed, epoch)
            size = self.context
            starts = range(0, max(1, (len(ids) - 1) // size) * size, size)
            trained = [start for start in starts if weights[start + 1 : start + size + 1].any()]
            self._epochs.clear()
            self._epochs[seed, epoch] = ids, weights, trained
        return self._epochs[seed, epoch]

    def _joined(self, seed: int, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """All conversations of an epoch in its order."""
        count = len(self.train)
        examples = [self.train[i] for i in drawn("conversations", seed, epoch, count, count)]
        ids, weights = (np.concatenate(parts) for parts in zip(*((e.ids, e.weights) for e in examples), strict=True))
        return ids, weights


@lru_cache(maxsize=2)
def _packed(lengths: tuple[int, ...], size: int) -> list[list[int]]:
    return best_fit(lengths, size)
