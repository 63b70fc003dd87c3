"""Tokenizer specification: the output of vocabulary readers, bounded file reads, and tables of a backend."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.files import reading

LIMIT = 500_000_000
FIX = "give the tokenizer's file, or a folder that holds it"


@dataclass(frozen=True)
class Parts:
    """The arguments of `Tokenizer`."""

    backend: Backend
    eos: str
    bos: str | None = None
    add_bos: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    model: bytes = b""
    encoder: Any = None
    stops: Sequence[str] = ()


def to_dict(backend: Backend) -> dict[str, Any]:
    """The tokenizer.json of a backend."""
    return json.loads(backend.to_str())


def by_id(backend: Backend) -> dict[int, str]:
    """Id -> token, added tokens included, in the order of the ids."""
    table = backend.get_vocab(with_added_tokens=True)
    return {table[name]: name for name in sorted(table, key=table.__getitem__)}


def read_bytes(file: Path) -> bytes:
    """The whole file, unless it is too large to be a vocabulary."""
    with reading(file, "the tokenizer", FIX):
        size = file.stat().st_size
        if size > LIMIT:
            expected = f"at most {LIMIT}"
            raise InputError("too large for a vocabulary", where=file, found=f"{size} bytes", expected=expected)
        return file.read_bytes()


def read_text(file: Path) -> str:
    """The whole file, which must be UTF-8."""
    try:
        return read_bytes(file).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError("this file is not UTF-8 text", where=file, found=str(error)) from None


def read_json(file: Path) -> dict[str, Any]:
    """The whole file, which must be a JSON object."""
    text = read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        found = f"{error}; it starts with {text[:40]!r}"
        raise InputError("this file is not JSON, or truncated", where=file, found=found) from None
    if not isinstance(value, dict):
        raise InputError("this file is not a JSON object", where=file, found=type(value).__name__)
    return value
