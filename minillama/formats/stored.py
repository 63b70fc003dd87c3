"""Stored tensor: what a file's header says of one. No torch."""

from __future__ import annotations

from typing import NamedTuple


class Stored(NamedTuple):
    """Stored tensor: dtype as the format names it, shape in torch's order, first byte and number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    size: int = 0
