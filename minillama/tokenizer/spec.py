"""Tokenizer specification: the output of vocabulary readers, and tables and calls of a backend."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer as Backend

from minillama.errors import InputError

LARGEST = 2**27
"""Bytes of a vocabulary at most; Gemma's has 33 MB."""
FIX = "give the tokenizer's file, or a folder that holds it, as --tokenizer (train: --tokenizer.path)"
_SURROGATE = re.compile("[\ud800-\udfff]")


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


def encode_texts(backend: Backend, texts: list[str]) -> list[list[int]]:
    """Token ids per text, encoded on all cores; lone surrogates are refused."""
    try:
        return [item.ids for item in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except TypeError:
        for text in texts:
            check_unicode(text)
        raise


def check_unicode(text: str) -> str:
    """The text; lone surrogates are refused."""
    if match := _SURROGATE.search(text):
        what = "this text is not valid Unicode: it holds a lone surrogate"
        raise InputError(what, found=ascii(text[match.start() :][:80]), fix="give it as UTF-8") from None
    return text
