"""Byte-level BPE pre-tokenization, its names in llama.cpp (tokenizer.ggml.pre), and the printable byte alphabet.

A tokenizer.json is text, so a byte-level vocabulary writes every byte as one printable character:
bytes 33-126, 161-172 and 174-255 map to themselves, the other 68 to U+0100, U+0101, ... in order (GPT-2,
src/encoder.py: bytes_to_unicode).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from minillama.tokenizer.reference.splitting import PATTERNS
from minillama.tokenizer.spec import to_dict

_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_TO_CHAR = [chr(byte if byte in _PRINTABLE else 256 + _HIDDEN.index(byte)) for byte in range(256)]
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def _pattern(expression: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]


# by the pattern's name in `reference/splitting.py`, as tokenizer.json spells it out
STEPS: dict[str, list[dict[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ],
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
    "llama-3": _pattern(PATTERNS["llama-3"]),
    # the library reads {1,3}+ as a nested repetition, not as a possessive quantifier
    "cl100k": _pattern(PATTERNS["cl100k"].replace("{1,3}+", "{1,3}")),
}
# llama.cpp's names; it has none for cl100k
PRE = {"smollm": STEPS["smollm"], "gpt-2": STEPS["gpt-2"], "llama-bpe": STEPS["llama-3"]}


def byte_level_bpe(
    pieces: Iterable[str],
    merges: list[tuple[str, str]],
    steps: Iterable[dict[str, Any]],
    special: Iterable[str],
    words: Iterable[str] = (),
    ignore_merges: bool = False,
) -> Backend:
    """A byte-level BPE backend.

    Args:
        pieces: the vocabulary in the order of its ids, bytes as printable characters.
        merges: in the order of their ranks.
        steps: pre-tokenizers; a value of `STEPS`.
        special: special tokens.
        words: added tokens that are never split, in plain UTF-8.
        ignore_merges: a word in the vocabulary is one token, whatever the merges; Llama 3's rule.
    """
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    whole = [{"trim_offsets": True, **step} if step["type"] == "ByteLevel" else step for step in steps]
    spec = to_dict(backend) | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": whole}}
    spec["decoder"] = json.loads(decoders.ByteLevel().__getstate__())
    backend = Backend.from_str(json.dumps(spec))
    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in words])
    return backend


def steps_of(backend: Backend) -> list[dict[str, Any]] | None:
    """The value of `STEPS` of a byte-level BPE backend; None for any other pre-tokenizer."""
    spec = to_dict(backend)
    first = spec["pre_tokenizer"] or {}
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in first.get("pretokenizers", [first])
    ]
    if spec["model"]["type"] != "BPE" or spec["normalizer"] is not None:
        return None
    return steps if steps in STEPS.values() else None


def pre_name(backend: Backend) -> str | None:
    """llama.cpp's name of the pre-tokenizer, None where GGUF cannot express this one."""
    steps = steps_of(backend)
    return next((name for name, known in PRE.items() if known == steps), None)


def piece_bytes(piece: str) -> bytes:
    """The bytes of a token piece; an added token outside the alphabet is plain UTF-8."""
    try:
        return bytes(CHAR_TO_BYTE[char] for char in piece)
    except KeyError:
        return piece.encode()
