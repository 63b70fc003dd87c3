"""Sequence packing: document ids and position ids of packed rows. B batch, T time."""

from __future__ import annotations

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
