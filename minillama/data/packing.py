"""Where documents begin and end inside a row of packed tokens. B batch, T time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["document_ids", "document_positions"]


def document_ids(tokens: NDArray[Any], separator: int) -> NDArray[np.int64]:
    """Which document each token belongs to: id_t = number of separators among tokens 0..t.

    The separator belongs to the document that it opens. A row that starts in the middle of a document
    starts with id 0.

    Args:
        tokens: (..., T) token ids.
        separator: the id that opens a document.

    Returns:
        (..., T) document ids, counted in each row from its start.
    """
    return np.cumsum(tokens == separator, axis=-1, dtype=np.int64)


def document_positions(tokens: NDArray[Any], separator: int) -> NDArray[np.int64]:
    """Position inside the document: t minus the place of the latest separator, or t where none came yet.

    Args:
        tokens: (..., T) token ids.
        separator: the id that opens a document; it has position 0.

    Returns:
        (..., T) position ids.
    """
    places = np.arange(tokens.shape[-1], dtype=np.int64)
    return places - np.maximum.accumulate(np.where(tokens == separator, places, 0), axis=-1)
