"""llama2.c's tokenizer.bin: the maximum length, then score, length and bytes per token (tokenizer.py, export)."""

from __future__ import annotations

import struct
from pathlib import Path

from minillama.errors import InputError
from minillama.files import read_bytes
from minillama.tokenizer.reference.byte_fallback import BYTE
from minillama.tokenizer.sentencepiece_vocab import SPACE, Pieces, PieceType
from minillama.tokenizer.spec import FIX, LARGEST, Parts

NAMES = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2; the file has newlines around the last two


def read(file: Path) -> Parts:
    """Read a tokenizer.bin.

    Raises:
        InputError: truncated, or not a tokenizer.bin.
    """
    data, at = read_bytes(file, FIX, LARGEST), 4
    names: list[str] = []
    scores: list[float] = []
    try:
        longest = struct.unpack_from("<i", data)[0]
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            if not 0 <= length <= longest or at + length > len(data):
                raise ValueError(f"a token of {length} bytes at byte {at}")
            names.append(data[at : at + length].decode())
            scores.append(score)
            at += length
        if len(names) < len(NAMES) + 256:
            raise ValueError(f"{len(names)} tokens")
    except (struct.error, ValueError) as error:
        expected = "scores and tokens as llama2.c's tokenizer.py writes them"
        raise InputError("not a llama2.c tokenizer, or truncated", where=file, found=error, expected=expected) from None
    names = [*NAMES, *(name.replace(" ", SPACE) for name in names[len(NAMES) :])]
    types = [PieceType.BYTE if BYTE.fullmatch(name) else PieceType.NORMAL for name in names]
    types[:3] = [PieceType.UNKNOWN, PieceType.CONTROL, PieceType.CONTROL]
    return Parts(Pieces(names, scores, types).backend(), eos="</s>", bos="<s>")
