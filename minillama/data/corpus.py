"""Batches as a pure function of (seed, step), over tokenized sources mixed by weight.

Sample i = step * batch size + row. Every block of 4096 samples gives each source its exact share of places,
in an order keyed by (seed, block). A source's own samples are windows of `length` + 1 tokens that start at
multiples of `length` plus an offset, in an order keyed by (seed, epoch): within an epoch no window comes
twice. So nothing needs to be stored to resume, and a process can make its rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from minillama.data.permutation import derive_keys, permute
from minillama.data.reading import Skipped
from minillama.data.shards import Shard
from minillama.errors import InputError

__all__ = ["BLOCK", "Corpus", "Split"]

BLOCK = 4096


class Split:
    """The tokens of a source, in one split, as one long array over its shards.

    Args:
        shards: in order.
        vocab_size: ids must be below it.
        bytes: UTF-8 bytes that the tokens stand for.
        name: what to call it in a message.
    """

    def __init__(self, shards: Sequence[Shard], vocab_size: int, bytes: int = 0, name: str = "data") -> None:
        self.shards, self.vocab_size, self.bytes, self.name = list(shards), vocab_size, bytes, name
        self._ends = np.cumsum([len(shard.tokens) for shard in self.shards], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return int(self._ends[-1]) if self.shards else 0

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens start..start+length-1.

        Raises:
            InputError: an id is not below `vocab_size`: shard, offset, id.
            IndexError: they are not all there.
        """
        if start < 0 or start + length > self.tokens:
            raise IndexError(f"tokens {start}..{start + length - 1} of {self.tokens}")
        out = np.empty(length, np.int64)
        done = 0
        while done < length:
            index = int(np.searchsorted(self._ends, start + done, side="right"))
            shard = self.shards[index]
            first = start + done - (int(self._ends[index]) - len(shard.tokens))
            part = shard.tokens[first : first + length - done]
            out[done : done + len(part)] = part
            if part.size and part.max() >= self.vocab_size:
                raise self._too_large(shard, first, out[done : done + len(part)])
            done += len(part)
        return out

    def val_windows(self, length: int) -> Iterator[NDArray[np.int64]]:
        """Consecutive windows of `length` + 1 tokens, the last one shorter, each overlapping the next by one.

        Every token but the first is predicted exactly once.
        """
        for start in range(0, self.tokens - 1, length):
            yield self.read(start, min(length + 1, self.tokens - start))

    def windows(self, length: int) -> int:
        """Training windows in an epoch: one less than tokens / length, to leave room for the offset."""
        return max(1, (self.tokens - length) // length) if self.tokens > length else 0

    def starts(self, indices: NDArray[np.int64], length: int, seed: int, source: int) -> NDArray[np.int64]:
        """Where the windows of the source's own samples start.

        Args:
            indices: (N,) numbers of samples of this source, from 0.
            length: T.
            seed: of the order.
            source: the source's number, so that two sources have different orders.

        Returns:
            (N,) offset_e + T * permutation_e(index mod n), e = index // n, with n windows in an epoch.
        """
        count = self.windows(length)
        slack = min(length - 1, self.tokens - 1 - count * length)
        epochs, places = np.divmod(indices, count)
        out = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            keys = derive_keys("epoch", seed, source, epoch)
            chosen = epochs == epoch
            order = permute(places[chosen].astype(np.uint64), count, keys).astype(np.int64)
            out[chosen] = order * length + keys[-1] % (slack + 1)
        return out

    def document(self, place: int, separator: int) -> int:
        """The number of the document that token `place` belongs to, from 0. Reads all that stands before it."""
        before = 0
        for shard, end in zip(self.shards, self._ends.tolist(), strict=True):
            part = shard.tokens[: max(0, place + 1 - (end - len(shard.tokens)))]
            before += int(np.count_nonzero(part == separator))
        return max(0, before - 1)

    def _too_large(self, shard: Shard, first: int, ids: NDArray[np.int64]) -> InputError:
        place = int(np.argmax(ids >= self.vocab_size))
        return InputError(
            "a token id lies outside the vocabulary",
            where=f"{shard.path}, token {first + place}",
            found=int(ids[place]),
            expected=f"less than {self.vocab_size}",
            fix="delete the folder it is in; the next start writes it again",
        )


class Corpus:
    """Training and held-out tokens of all sources.

    Args:
        train: a split a source.
        val: the same sources' held-out splits.
        weights: share of the samples, relative to each other; equal unless given.
        separator: the id that opens a document, None where there are no separators.
        fingerprint: SHA-256 of what the batches depend on but seed and step.
        skipped: documents that were left out.

    Raises:
        InputError: a weight so small that a block of 4096 samples has no place for its source.
    """

    def __init__(
        self,
        train: Sequence[Split],
        val: Sequence[Split],
        weights: Sequence[float] | None = None,
        *,
        separator: int | None = None,
        fingerprint: str = "",
        skipped: Skipped | None = None,
    ) -> None:
        self.train, self.val = list(train), list(val)
        self.weights = list(weights or [1.0] * len(self.train))
        self.separator, self.fingerprint, self.skipped = separator, fingerprint, skipped or Skipped()
        self.places = _places(self.weights)
        if not all(self.places):
            index = self.places.index(0)
            raise InputError(
                "the weight of a source is too small: it would never be read",
                where=f"data.sources.{index}.weight ({self.train[index].name})",
                found=self.weights[index],
                expected=f"at least {sum(self.weights) / BLOCK:g}, 1/{BLOCK} of the sum",
            )

    @property
    def has_separators(self) -> bool:
        """Whether the documents of any source start with the separator token."""
        return self.separator is not None

    def batch(
        self, seed: int, step: int, rows: int, length: int, first_row: int = 0, total_rows: int | None = None
    ) -> NDArray[np.int64]:
        """Rows of a step's batch: a pure function of the arguments.

        Args:
            seed: of the order.
            step: from 0.
            rows: how many.
            length: T.
            first_row: the first one's number in the step's batch: a process among several asks for its own.
            total_rows: rows of the whole batch; `rows` unless given.

        Returns:
            (rows, T + 1) token ids: inputs are all but the last column, targets all but the first.

        Raises:
            InputError: less data than a batch, or an id outside the vocabulary.
        """
        total = total_rows or rows
        self._check_train(length, total)
        out = np.empty((rows, length + 1), np.int64)
        for row, (split, start) in enumerate(self._windows(seed, step * total + first_row, rows, length)):
            out[row] = split.read(start, length + 1)
        return out

    def where(self, seed: int, step: int, rows: int, length: int, chosen: Sequence[int]) -> list[str]:
        """Where the chosen rows of a step's batch stand, as `python-docs (train), document 12, tokens 34560..34816`.

        Documents are counted from 0 within the split, by reading what stands before; tokens too, over all shards.
        """
        places = []
        windows = self._windows(seed, step * rows, rows, length)
        for split, start in (windows[row] for row in chosen):
            text = "" if self.separator is None else f", document {split.document(start, self.separator)}"
            places.append(f"{split.name}{text}, tokens {start}..{start + length}")
        return places

    def _windows(self, seed: int, first: int, rows: int, length: int) -> list[tuple[Split, int]]:
        """The split and the start of the windows of `rows` samples from number `first` on."""
        sources, indices = self._sources(first + np.arange(rows, dtype=np.int64), seed)
        starts = np.empty(rows, np.int64)
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)
            starts[mine] = self.train[source].starts(indices[mine], length, seed, source)
        return [(self.train[source], start) for source, start in zip(sources.tolist(), starts.tolist(), strict=True)]

    def held_out(self, length: int, limit: int = 0) -> Iterator[tuple[Split, Iterator[NDArray[np.int64]]]]:
        """Each source's held-out text as `Split.val_windows(length)`.

        Args:
            length: T.
            limit: about so many tokens in all, in windows spread over all of the text; 0: all of it.
        """
        total = sum(split.tokens for split in self.val)
        every = max(1, total // limit) if limit else 1
        for split in self.val:
            if split.tokens > 1:
                yield split, islice(split.val_windows(length), 0, None, every)

    def check(self, length: int, rows: int) -> None:
        """Whether there is a batch of training windows in every source, and held-out text.

        Raises:
            InputError: there is not, with both sizes.
        """
        self._check_train(length, rows)
        if not any(split.tokens > 1 for split in self.val):
            raise InputError(
                "there is no held-out text",
                where="data.val_fraction",
                found=f"{sum(split.tokens for split in self.val)} held-out tokens, "
                f"{sum(split.tokens for split in self.train)} training tokens",
                expected="at least 2 held-out tokens",
                fix="raise data.val_fraction, or give more text",
            )

    def _check_train(self, length: int, rows: int) -> None:
        for split, places in zip(self.train, self.places, strict=True):
            needed = -(-rows * places // BLOCK)
            if split.tokens <= length:
                raise InputError(
                    "the training text is shorter than the context",
                    where=split.name,
                    found=f"{split.tokens} tokens",
                    expected=f"at least {length + 1} (train.context {length}, and one to predict)",
                    fix="give more text, or make train.context smaller",
                )
            if split.windows(length) < needed:
                raise InputError(
                    "the training text is shorter than one batch",
                    where=split.name,
                    found=f"{split.tokens} tokens, {split.windows(length)} windows of {length}",
                    expected=f"at least {needed} windows (train.batch_size {rows})",
                    fix="give more text, or make train.batch_size or train.context smaller",
                )

    def _sources(self, samples: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each sample, and the sample's number among those of its source."""
        if len(self.train) == 1:
            return np.zeros_like(samples), samples
        blocks, within = np.divmod(samples, BLOCK)
        sources, indices = np.empty_like(samples), np.empty_like(samples)
        places = np.asarray(self.places)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            order, ranks = _block(seed, block, tuple(self.places))
            sources[chosen] = order[within[chosen]]
            indices[chosen] = block * places[sources[chosen]] + ranks[within[chosen]]
        return sources, indices


def _places(weights: Sequence[float]) -> list[int]:
    """Each source's places among 4096, by largest remainder: they differ from weight / sum * 4096 by less than 1."""
    exact = np.asarray(weights, np.float64) / sum(weights) * BLOCK
    places = np.floor(exact).astype(int)
    order = np.argsort(places - exact, kind="stable")
    places[order[: BLOCK - int(places.sum())]] += 1
    return [int(count) for count in places]


@lru_cache(maxsize=8)
def _block(seed: int, block: int, places: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(4096,) source of each sample of a block, and how many of the same source come before it."""
    labels = np.repeat(np.arange(len(places)), places)
    order = labels[
        permute(np.arange(BLOCK, dtype=np.uint64), BLOCK, derive_keys("block", seed, block)).astype(np.int64)
    ]
    ranks = np.empty(BLOCK, np.int64)
    for source, count in enumerate(places):
        ranks[order == source] = np.arange(count)
    return order, ranks
