"""Byte fallback: a character outside the vocabulary is encoded as byte tokens `<0x00>` to `<0xFF>`.

SentencePiece's `byte_fallback`, as in Llama 1 and 2: 256 more token pieces, and no text is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def encode(pieces: Iterable[str], known: Container[str]) -> list[str]:
    """Byte fallback: unknown token pieces replaced by the byte tokens of their UTF-8."""
    result: list[str] = []
    for piece in pieces:
        result += [piece] if piece in known else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return result


def decode(pieces: Iterable[str]) -> str:
    """The text of token pieces. A run of byte tokens that is not valid UTF-8 gives U+FFFD per byte."""
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
