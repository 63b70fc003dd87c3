"""Stored tensor: what a file's header says of one. No torch."""

from __future__ import annotations

from typing import NamedTuple


class Stored(NamedTuple):
    """Stored tensor: dtype as the format names it, shape in torch's order, first byte and number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    size: int = 0

    def rows(self, first: int, last: int) -> Stored:
        """Rows from `first` up to `last`."""
        width = self.size // self.shape[0]
        return self._replace(
            shape=(last - first, *self.shape[1:]), start=self.start + first * width, size=(last - first) * width
        )
