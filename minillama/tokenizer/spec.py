"""Tokenizer specification: the output of vocabulary readers, bounded file reads, and tables of a backend."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer as Backend

from minillama.errors import InputError

LARGEST = 2**27
"""Bytes of a vocabulary at most; Gemma's has 33 MB."""
FIX = "give the tokenizer's file, or a folder that holds it"


@contextmanager
def library(where: object, what: str = "the vocabulary or its normalization is damaged") -> Iterator[None]:
    """InputError for what a tokenizer library raises from a file; a panic of Rust's is no Exception."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(what, where=where, found=f"{type(error).__name__}: {error}") from None


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
