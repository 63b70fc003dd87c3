"""The printable alphabet of byte-level vocabularies (GPT-2, src/encoder.py: bytes_to_unicode).

A tokenizer.json is text, so a byte-level vocabulary writes every byte as one printable character:
bytes 33-126, 161-172 and 174-255 stand for themselves, the other 68 take U+0100, U+0101, ... in order.
"""

from __future__ import annotations

__all__ = ["BYTE_TO_CHAR", "CHAR_TO_BYTE", "piece_bytes"]

_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_TO_CHAR = [chr(byte if byte in _PRINTABLE else 256 + _HIDDEN.index(byte)) for byte in range(256)]
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def piece_bytes(piece: str) -> bytes:
    """The bytes that a vocabulary entry stands for; an added token outside the alphabet is plain UTF-8."""
    try:
        return bytes(CHAR_TO_BYTE[char] for char in piece)
    except KeyError:
        return piece.encode()
