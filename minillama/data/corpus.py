"""Deterministic data sampler: batches as a pure function of (seed, step), over sources mixed by weight.

Sample i = step * batch size + row. Every block of 4096 samples gives each source its exact share of samples,
in an order keyed by (seed, block). A source's own samples are windows of `length` + 1 tokens that start at
multiples of `length` plus an offset, shuffled by (seed, epoch) without replacement within an epoch. So resuming
needs no stored state, and a process can make its own rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from minillama.config.arguments import Count, Positive, checked
from minillama.config.loader import check
from minillama.data.permutation import derive_keys, permute
from minillama.data.shards import Shard, damaged
from minillama.data.skipped import Skipped
from minillama.errors import InputError

BLOCK = 4096


@dataclass(eq=False)
class Split:
    """Tokens of a source in one split, concatenated over its shards.

    The ids are below `vocab_size`; `bytes` is the size of the text in UTF-8, `name` is for messages; `opening` tokens
    stand in front of the first whole word, where the split begins within a document.
    """

    shards: Sequence[Shard]
    vocab_size: int
    bytes: int = 0
    name: str = "data"
    opening: int = 0

    def __post_init__(self) -> None:
        self._ends = np.cumsum([len(shard.tokens) for shard in self.shards], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self._ends[-1]) if self.shards else 0

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens start..start+length-1.

        Raises:
            InputError: an id is not below `vocab_size`: shard, offset, id.
            IndexError: out of range.
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
            if part.size and part.max() >= self.vocab_size:
                index = int(np.argmax(part >= self.vocab_size))
                what, expected = "a token id lies outside the vocabulary", f"less than {self.vocab_size}"
                raise damaged(shard.path, what, int(part[index]), expected, f", token {first + index}")
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def val_windows(self, length: int) -> Iterator[NDArray[np.int64]]:
        """Validation windows: consecutive, `length` + 1 tokens, the last one shorter, overlapping by one.

        Every token but the first is predicted exactly once.
        """
        for start in range(0, self.tokens - 1, length):
            yield self.read(start, min(length + 1, self.tokens - start))

    def windows(self, length: int) -> int:
        """Training windows per epoch: one less than tokens / length, to leave room for the offset."""
        return max(1, (self.tokens - length) // length) if self.tokens > length else 0

    def starts(self, indices: NDArray[np.int64], length: int, seed: int, source: int) -> NDArray[np.int64]:
        """Start offsets of the windows of this source's samples.

        Args:
            indices: (N,) sample indices within this source, from 0.
            length: T.
            seed: of the shuffling.
            source: index of the source, so that two sources have different orders.

        Returns:
            (N,) offset_e + T * permutation_e(index mod n), e = index // n, with n windows per epoch.
        """
        count = self.windows(length)
        slack = min(length - 1, self.tokens - 1 - count * length)
        epochs, positions = np.divmod(indices, count)
        out = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            keys = derive_keys("epoch", seed, source, epoch)
            chosen = epochs == epoch
            order = permute(positions[chosen].astype(np.uint64), count, keys).astype(np.int64)
            out[chosen] = order * length + keys[-1] % (slack + 1)
        return out

    def document(self, position: int, separator: int) -> int:
        """Index of the document of the token at a position, from 0. Reads all tokens before it."""
        before = 0
        for shard, end in zip(self.shards, self._ends.tolist(), strict=True):
            part = shard.tokens[: max(0, position + 1 - (end - len(shard.tokens)))]
            before += int(np.count_nonzero(part == separator))
        return max(0, before - 1)


@dataclass(eq=False)
class Corpus:
    """Tokenized corpus: training and held-out splits of all sources.

    Args:
        train: one split per source.
        val: the same sources' held-out splits.
        weights: mixture weights, relative to each other; equal unless given.
        separator: token id that begins a document, None where there are no separators.
        fingerprint: SHA-256 of all that batches depend on except seed and step.
        skipped: documents left out, and what is said of the files.
        held_out_part: what of the text is held out, for messages.

    Raises:
        InputError: a weight below one sample per block of 4096.
    """

    train: Sequence[Split]
    val: Sequence[Split]
    weights: Sequence[float] | None = None
    separator: int | None = None
    fingerprint: str = ""
    skipped: Skipped = field(default_factory=Skipped)
    held_out_part: str = ""

    def __post_init__(self) -> None:
        check(self)
        weights = self.weights or [1.0] * len(self.train)
        self.block_counts = _apportion(weights)
        if not all(self.block_counts):
            index = self.block_counts.index(0)
            what = "the weight of a source is too small: it would never be read"
            where = f"data.sources.{index}.weight ({self.train[index].name})"
            expected = f"at least {sum(weights) / BLOCK:g}, 1/{BLOCK} of the sum"
            raise InputError(what, where=where, found=weights[index], expected=expected)

    @checked
    def batch(
        self,
        seed: int,
        step: Count,
        rows: Positive,
        length: Positive,
        first_row: int = 0,
        total_rows: int | None = None,
    ) -> NDArray[np.int64]:
        """Batch of a step: a pure function of the arguments.

        Args:
            seed: of the shuffling.
            step: from 0.
            rows: B, the number of rows.
            length: T.
            first_row: index of the first row in the global batch, for data parallelism.
            total_rows: rows of the global batch; `rows` unless given.

        Returns:
            (B, T + 1) token ids: inputs are all but the last column, targets all but the first.

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
        """Locations of the chosen rows of a batch, as `python-docs (train), document 12, tokens 34560..34816`.

        Documents are counted from 0 within the split, by reading all tokens before; tokens too, over all shards.
        """
        locations = []
        windows = self._windows(seed, step * rows, rows, length)
        for split, start in (windows[row] for row in chosen):
            text = "" if self.separator is None else f", document {split.document(start, self.separator)}"
            locations.append(f"{split.name}{text}, tokens {start}..{start + length}")
        return locations

    def _windows(self, seed: int, first: int, rows: int, length: int) -> list[tuple[Split, int]]:
        """Split and start offset of the windows of samples `first` to `first` + `rows` - 1."""
        sources, indices = self._sources(first + np.arange(rows, dtype=np.int64), seed)
        starts = np.empty(rows, np.int64)
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)
            starts[mine] = self.train[source].starts(indices[mine], length, seed, source)
        return [(self.train[source], start) for source, start in zip(sources.tolist(), starts.tolist(), strict=True)]

    def held_out(self, length: int, limit: int = 0) -> Iterator[tuple[Split, Iterator[NDArray[np.int64]]]]:
        """Held-out windows per source, as `Split.val_windows(length)`.

        `limit` is the approximate number of tokens in all, in evenly spaced windows; 0: all.
        """
        total = sum(split.tokens for split in self.val)
        every = max(1, total // limit) if limit else 1
        for split in self.val:
            if split.tokens > 1:
                yield split, islice(split.val_windows(length), 0, None, every)

    def prompt(self, length: int) -> list[int]:
        """First whole words of the held-out text, up to `length` tokens of one document; empty where there is none."""
        split = next((split for split in self.val if split.tokens), None)
        start = 0 if split is None else split.opening % split.tokens
        ids: list[int] = [] if split is None else split.read(start, min(length, split.tokens - start)).tolist()
        return ids[: ids.index(self.separator, 1)] if self.separator in ids[1:] else ids

    def check(self, length: int, rows: int) -> None:
        """Refuse a corpus without a batch of training windows in every source, or without held-out text.

        Raises:
            InputError: too little text, with both sizes.
        """
        self._check_train(length, rows)
        if not any(split.tokens > 1 for split in self.val):
            held_out, training = (sum(split.tokens for split in side) for side in (self.val, self.train))
            raise InputError(
                "there is no held-out text",
                where="data.val_fraction",
                found=f"{held_out} held-out tokens, {training} training tokens",
                expected="at least 2 held-out tokens",
                fix="raise data.val_fraction, or give more text",
            )

    def _check_train(self, length: int, rows: int) -> None:
        for split, share in zip(self.train, self.block_counts, strict=True):
            needed = -(-rows * share // BLOCK)
            if split.tokens <= length:
                raise InputError(
                    "the training text is shorter than the context",
                    where=split.name,
                    found=f"{split.tokens} tokens",
                    expected=f"at least {length + 1} (train.context {length}, and one to predict)",
                    fix="give more text, or make train.context smaller",
                )
            if (count := split.windows(length)) < needed:
                raise InputError(
                    "the training text is shorter than one batch",
                    where=split.name,
                    found=f"{split.tokens} tokens, {count} window{'s' * (count != 1)} of {length}",
                    expected=f"at least {needed} windows (train.batch_size {rows})",
                    fix="give more text, or make train.batch_size or train.context smaller",
                )

    def _sources(self, samples: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each sample, and the sample's index within that source."""
        if len(self.train) == 1:
            return np.zeros_like(samples), samples
        blocks, within = np.divmod(samples, BLOCK)
        sources, indices = np.empty_like(samples), np.empty_like(samples)
        counts = np.asarray(self.block_counts)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            order, ranks = _block(seed, block, tuple(self.block_counts))
            sources[chosen] = order[within[chosen]]
            indices[chosen] = block * counts[sources[chosen]] + ranks[within[chosen]]
        return sources, indices


def _apportion(weights: Sequence[float]) -> list[int]:
    """Samples per source in a block of 4096, by largest remainder: within 1 of weight / sum * 4096."""
    exact = np.asarray(weights, np.float64) / sum(weights) * BLOCK
    counts = np.floor(exact).astype(int)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: BLOCK - int(counts.sum())]] += 1
    return [int(count) for count in counts]


@lru_cache(maxsize=8)
def _block(seed: int, block: int, counts: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(4096,) source of each sample of a block, and its rank within that source."""
    labels = np.repeat(np.arange(len(counts)), counts)
    shuffled = permute(np.arange(BLOCK, dtype=np.uint64), BLOCK, derive_keys("block", seed, block))
    order = labels[shuffled.astype(np.int64)]
    ranks = np.empty(BLOCK, np.int64)
    for source, count in enumerate(counts):
        ranks[order == source] = np.arange(count)
    return order, ranks
