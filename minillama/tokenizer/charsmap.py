"""SentencePiece's compiled normalization, checked before a library reads it.

Four bytes of length, a double-array trie of 32-bit units (darts-clone, Yata 2012), and the texts that its leaves point
to, each ended by a NUL. Neither library checks a place in it: a forged one aborts the process or reads beyond its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minillama.errors import InputError

_LEAF, _VALUE = 1 << 8, 1 << 31


def check(data: bytes, where: object) -> None:
    """Check that every place in a normalization lies in it; an empty one is the identity.

    Raises:
        InputError: one does not.
    """
    if data and not _is_sound(data):
        raise InputError("the vocabulary or its normalization is damaged", where=where, found="precompiled_charsmap")


def charsmaps(normalizer: Any) -> Iterator[object]:
    """The normalizations of this kind in the normalizer of a tokenizer.json, in base64."""
    if isinstance(normalizer, dict):
        yield from [normalizer["precompiled_charsmap"]] if "precompiled_charsmap" in normalizer else []
        yield from charsmaps(normalizer.get("normalizers"))
    elif isinstance(normalizer, list):
        for step in normalizer:
            yield from charsmaps(step)


def _is_sound(data: bytes) -> bool:
    size = int.from_bytes(data[:4], "little")
    if not 1024 <= size <= len(data) - 4 or size % 1024:
        return False
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    text = data[4 + size :]
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    inner = units < _VALUE
    places = np.arange(len(units)) ^ (units >> 10 << ((units & 512) >> 6))  # of the children of each unit
    if (places[inner] | 255).max() >= len(units):
        return False
    leaves = units[places[inner & (units & _LEAF > 0)]] & (_VALUE - 1)
    starts = np.append((np.frombuffer(text, np.uint8) & 0xC0) != 0x80, True)  # of a character, or the end
    return bool((leaves < len(starts)).all() and starts[leaves].all())
