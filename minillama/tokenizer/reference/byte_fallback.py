"""Byte fallback: a character outside the vocabulary is spelt in byte pieces `<0x00>` to `<0xFF>`.

SentencePiece's `byte_fallback`, as Llama 1 and 2 have it: 256 more pieces, and no text is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

__all__ = ["BYTE", "decode", "spell"]

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def spell(pieces: Iterable[str], known: Container[str]) -> list[str]:
    """The pieces, with the UTF-8 bytes of each that is not known in its place."""
    result: list[str] = []
    for piece in pieces:
        result += [piece] if piece in known else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return result


def decode(pieces: Iterable[str]) -> str:
    """Join the pieces. A run of bytes becomes its characters, or U+FFFD for each byte where it is no UTF-8."""
    text, run = "", b""
    for piece in [*pieces, ""]:
        if byte := BYTE.fullmatch(piece):
            run += bytes([int(byte[1], 16)])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        text, run = text + piece, b""
    return text
