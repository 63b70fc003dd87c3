"""Data set of examples: its held-out split, the order of an epoch, and batches of similar lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from minillama.data.permutation import derive_keys, hash_fraction, permute
from minillama.data.skipped import Skipped
from minillama.errors import InputError

T = TypeVar("T")


def is_held_out(text: str, val_fraction: float) -> bool:
    """Whether a hash of a text falls below the fraction: the split of an example depends on no other example.

    The text is that of a document, or the first question of a conversation (`Conversation.question`), whatever the
    answers are: what fine-tuning, preferences and rollouts hold out of the same questions is the same.
    """
    return hash_fraction(text, "held out") < val_fraction


def drawn(kind: str, seed: int, step: int, count: int, size: int) -> list[int]:
    """Indices of a step's `count` of `size` examples, without replacement within an epoch.

    A pure function of the arguments; `kind` gives each kind of data an order of its own.
    """
    epochs, places = np.divmod(np.arange(step * count, (step + 1) * count), size)
    found: list[int] = []
    for epoch in np.unique(epochs).tolist():
        keys = derive_keys(kind, seed, epoch)
        found += permute(places[epochs == epoch].astype(np.uint64), size, keys).astype(int).tolist()
    return found


def too_few(kind: str, train: Sequence[object], val: Sequence[object], skipped: Skipped, but: str = "") -> InputError:
    """Error of an empty split; `but` is what else examples must be."""
    found = f"{len(train)} to train on, {len(val)} held out" + (f"; {skipped}" if skipped.total else "")
    expected, fix = f"at least one of each{but}", "give more, or another data.val_fraction"
    return InputError(f"too few {kind}", where="data.sources", found=found, expected=expected, fix=fix)


def by_length(examples: Sequence[T], length: Callable[[T], int], count: int, every: int) -> Iterator[list[T]]:
    """One in `every` examples, `count` of similar lengths at a time."""
    ordered = sorted(examples[::every], key=length)
    yield from (ordered[start : start + count] for start in range(0, len(ordered), count))
