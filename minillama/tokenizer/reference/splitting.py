"""Regex pre-tokenization, word and character segmentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import regex

from minillama.errors import InputError

# openai/gpt-2 src/encoder.py; openai/tiktoken tiktoken_ext/openai_public.py; meta-llama/llama3 llama/tokenizer.py
PATTERNS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
        r"|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "llama-3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # Qwen2's: Llama 3's with single digits
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # SmolLM's: single digits, GPT-2's words between them
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    # SentencePiece's: U+2581, a space, begins a word; here newlines end one, too
    "sentencepiece": r"▁?[^▁\n]+|▁|\n",
    "words": r"[\p{L}\p{M}\p{N}_]+|[^\s\p{L}\p{M}\p{N}_]+",
    # BERT's: single punctuation marks and Han characters
    "bert": r"[\p{Han}\p{P}$+<=>^`|~]|[^\s\p{Han}\p{P}$+<=>^`|~]+",
    "spaces": r"\S+",
}
# lossless patterns; the others drop whitespace
LOSSLESS_PATTERNS = ("gpt-2", "cl100k", "llama-3", "qwen2", "smollm", "sentencepiece")


def split(text: str, pattern: str) -> list[str]:
    """Pre-tokenization by a key of `PATTERNS`; those of `LOSSLESS_PATTERNS` are lossless, the others drop whitespace.

    Raises:
        InputError: an unknown pattern.
    """
    if pattern not in PATTERNS:
        raise InputError("unknown pattern", where="pattern", found=pattern, expected=", ".join(PATTERNS))
    return regex.findall(PATTERNS[pattern], text)


def characters(text: str) -> list[str]:
    """Character segmentation: code points."""
    return list(text)


def by_frequency(counts: Mapping[str, int]) -> list[str]:
    """Words or characters by descending count; ties by code points."""
    return sorted(counts, key=lambda word: (-counts[word], word))


def count_words(texts: Iterable[str], pattern: str) -> Counter[str]:
    """Word counts, in order of first occurrence."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split(text, pattern))
    return counts
