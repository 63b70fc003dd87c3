"""Sequence packing: rows of whole sequences, document ids and position ids of packed rows. B batch, T time."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def document_ids(tokens: NDArray[Any], separator: int) -> NDArray[np.int64]:
    """Document ids: id_t = number of separators among tokens 0..t.

    The separator belongs to the document that it begins. A row that starts in the middle of a document
    starts with id 0.

    Args:
        tokens: (..., T) token ids.
        separator: token id that begins a document.

    Returns:
        (..., T) ids, counted in each row from its start.
    """
    return np.cumsum(tokens == separator, axis=-1, dtype=np.int64)


def document_positions(tokens: NDArray[Any], separator: int) -> NDArray[np.int64]:
    """Position ids within documents: t minus the position of the latest separator, or t before the first.

    The arguments are those of `document_ids`. A separator has position 0.
    """
    positions = np.arange(tokens.shape[-1], dtype=np.int64)
    return positions - np.maximum.accumulate(np.where(tokens == separator, positions, 0), axis=-1)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Best-fit decreasing bin packing (Johnson et al. 1974): each item, longest first, into the fullest row it fits.

    Args:
        lengths: of the items, each at most `size`.
        size: of a row.

    Returns:
        Indices of the items of each row; rows in the order in which they were opened, a pure function of the lengths.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(size + 1)]  # by free slots
    free: list[int] = []  # sorted sizes with an open row
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        length = lengths[item]
        at = bisect_left(free, length)
        if at == len(free):
            rows.append([])
            row, left = len(rows) - 1, size
        else:
            left = free[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del free[at]
        rows[row].append(item)
        left -= length
        if not open_rows[left]:
            insort(free, left)
        open_rows[left].append(row)
    return rows
