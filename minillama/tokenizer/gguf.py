"""GGUF vocabulary import (`tokenizer.*` keys)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.formats.gguf_header import GGUFHeader, read_header
from minillama.tokenizer.pre import PRE, byte_level_bpe
from minillama.tokenizer.sentencepiece_vocab import Pieces, PieceType
from minillama.tokenizer.spec import Parts

PREFIX = "tokenizer.ggml."


def read(file: Path) -> Parts:
    """Read the vocabulary and the chat template.

    Raises:
        InputError: a damaged file, or an unknown tokenizer model.
    """
    header = read_header(file)
    names = header.get(f"{PREFIX}tokens", list)
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError("the file holds no vocabulary", where=f"{file}, {PREFIX}tokens")
    kind = header.get(f"{PREFIX}model", str)
    types = _numbers(header, "token_type", names, PieceType.NORMAL)
    scores = _numbers(header, "scores", names, 0.0)
    pieces = Pieces(names, scores, types, dummy_prefix=header.get(f"{PREFIX}add_space_prefix", bool, True))
    if kind == "llama":
        backend, defaults, add_bos = pieces.backend(), (1, 2), True
    elif kind == "gpt2":
        pre = header.get(f"{PREFIX}pre", str)
        backend = _byte_level(header, pre, pieces)
        defaults, add_bos = (11, 11), pre == "llama-bpe"  # llama.cpp, src/llama-vocab.cpp
    else:
        where = f"{file}, {PREFIX}model"
        raise InputError("this kind of tokenizer is not supported", where=where, found=kind, expected="llama or gpt2")
    bos, eos = _named(header, "bos", defaults[0], names), _named(header, "eos", defaults[1], names)
    template = header.get("tokenizer.chat_template", str, "")
    add_bos = header.get(f"{PREFIX}add_bos_token", bool, add_bos)
    return Parts(backend, eos, bos, add_bos, {"chat_template": template} if template else {})


def _byte_level(header: GGUFHeader, pre: str, pieces: Pieces) -> Backend:
    if pre not in PRE:
        where = f"{header.path}, {PREFIX}pre"
        raise InputError("this pre-tokenizer is not known", where=where, found=pre, expected=", ".join(PRE))
    known = set(pieces.names)
    pairs = (str(pair).partition(" ") for pair in header.get(f"{PREFIX}merges", list, []))
    merges = [(left, right) for left, _, right in pairs if known >= {left, right, left + right}]
    special = pieces.of_type(PieceType.CONTROL, PieceType.UNKNOWN)
    words = pieces.of_type(PieceType.USER_DEFINED)
    return byte_level_bpe(pieces.names, merges, PRE[pre], special, words, ignore_merges=pre == "llama-bpe")


def _numbers(header: GGUFHeader, key: str, names: list[str], default: float) -> list[Any]:
    values = header.metadata.get(PREFIX + key)
    if values is None:
        return [default] * len(names)
    if not isinstance(values, np.ndarray) or len(values) != len(names):
        where, expected = f"{header.path}, {PREFIX}{key}", f"{len(names)} numbers, one per token"
        raise InputError("not one number per token", where=where, expected=expected)
    return list(values.tolist())


def _named(header: GGUFHeader, key: str, default: int, names: list[str]) -> str:
    index = header.get(f"{PREFIX}{key}_token_id", int, default)
    if not 0 <= index < len(names):
        where, expected = f"{header.path}, {PREFIX}{key}_token_id", f"below {len(names)}"
        raise InputError("this token is not in the vocabulary", where=where, found=index, expected=expected)
    return names[index]
