"""Byte-level BPE pre-tokenization, its names in llama.cpp (tokenizer.ggml.pre), and the printable byte alphabet.

A tokenizer.json is text, so a byte-level vocabulary writes every byte as one printable character:
bytes 33-126, 161-172 and 174-255 map to themselves, the other 68 to U+0100, U+0101, ... in order (GPT-2,
src/encoder.py: bytes_to_unicode).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split
from tokenizers.pre_tokenizers import Sequence as Steps

from minillama.tokenizer.reference.splitting import PATTERNS
from minillama.tokenizer.spec import to_dict

_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_TO_CHAR = [chr(byte if byte in _PRINTABLE else 256 + _HIDDEN.index(byte)) for byte in range(256)]
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}

_GPT2 = ByteLevel(add_prefix_space=False)
_BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
# by the pattern's name in `reference/splitting.py`
STEPS = {
    "smollm": Steps([Digits(individual_digits=True), _GPT2]),
    "gpt-2": Steps([_GPT2]),
    "llama-3": Steps([Split(Regex(PATTERNS["llama-3"]), "isolated"), _BYTES]),
    "qwen2": Steps([Split(Regex(PATTERNS["qwen2"]), "isolated"), _BYTES]),
    # the library reads {1,3}+ as a nested repetition, not as a possessive quantifier
    "cl100k": Steps([Split(Regex(PATTERNS["cl100k"].replace("{1,3}+", "{1,3}")), "isolated"), _BYTES]),
}
# llama.cpp's names -> ours, the first of several the usual one; it has none for cl100k
PRE = {"smollm": "smollm", "gpt-2": "gpt-2", "llama-bpe": "llama-3", "llama3": "llama-3", "llama-v3": "llama-3"}
PRE |= {"qwen2": "qwen2", "deepseek-r1-qwen": "qwen2"}
NFC = {"type": "NFC"}  # of Qwen's files; llama.cpp does not normalize


def byte_level_bpe(
    pieces: Iterable[str],
    merges: Sequence[tuple[str, str]],
    pattern: str,
    special: Iterable[str],
    words: Iterable[str] = (),
    ignore_merges: bool = False,
) -> Backend:
    """A byte-level BPE backend.

    Args:
        pieces: the vocabulary in the order of its ids, bytes as printable characters.
        pattern: of the pre-tokenizer, a key of `STEPS`.
        words: added tokens that are never split, in plain UTF-8.
        ignore_merges: a word in the vocabulary is one token, whatever the merges; Llama 3's rule.
    """
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=list(merges), ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = STEPS[pattern], decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in words])
    return backend


def pattern_of(backend: Backend) -> str | None:
    """Pattern of a byte-level BPE backend, a key of `STEPS`; None for any other."""
    spec = to_dict(backend)
    if spec["model"]["type"] != "BPE" or spec["normalizer"] not in (None, NFC) or spec["pre_tokenizer"] is None:
        return None
    name = next((name for name, known in STEPS.items() if _steps(known) == _steps(backend.pre_tokenizer)), None)
    return name if spec["normalizer"] is None or name == "qwen2" else None


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    spec = json.loads(pre_tokenizer.__getstate__())
    # not the offsets: they are no matter of the words
    return [step | {"trim_offsets": None} for step in spec.get("pretokenizers", [spec])]


def piece_bytes(piece: str) -> bytes:
    """The bytes of a token piece; an added token outside the alphabet is plain UTF-8."""
    try:
        return bytes(CHAR_TO_BYTE[char] for char in piece)
    except KeyError:
        return piece.encode()
