"""Tokenizer kinds: the names alone, so that configurations load without the libraries."""

from __future__ import annotations

from typing import Literal

Kind = Literal["byte-bpe", "bpe", "unigram", "sentencepiece", "wordpiece", "word", "char", "bytes"]
