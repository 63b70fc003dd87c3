"""Keyed pseudorandom permutations: shuffling in O(1) memory.

Pure arithmetic on uint64, so that an order is the same on every machine and for every version of numpy.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


@lru_cache(maxsize=256)
def derive_keys(*parts: int | str) -> tuple[int, ...]:
    """Key derivation: eight 64-bit keys from all the parts (BLAKE2b)."""
    digest = blake2b(repr(parts).encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8))


def permute(indices: NDArray[np.uint64], size: int, keys: tuple[int, ...]) -> NDArray[np.uint64]:
    """Keyed permutation of 0..size-1, applied to indices, in O(1) memory.

    A balanced Feistel network permutes 0..4^k-1, the least power of 4 that holds `size`; indices outside the
    range are permuted again until they are inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002), fewer than four times on average.

    The indices, of any shape, are below `size`, which is at most 2^62; the keys are from `derive_keys`.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    out = _feistel(indices.astype(np.uint64), half, keys)
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out


def _feistel(x: NDArray[np.uint64], half: np.uint64, keys: tuple[int, ...]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys[:_ROUNDS]:
        left, right = right, left ^ (_mix(right ^ np.uint64(key)) & mask)
    return left << half | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of splitmix64: every input bit flips half of the output bits."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def hash_fraction(text: str, key: str) -> float:
    """Keyed hash of a text as a number in [0, 1): the top 53 bits of BLAKE2b."""
    digest = blake2b(text.encode(), key=key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
