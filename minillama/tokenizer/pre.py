"""Pre-tokenizers of byte-level BPE under the names that llama.cpp has for them (tokenizer.ggml.pre)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from minillama.tokenizer.reference.splitting import PATTERNS

__all__ = ["PRE", "byte_level_bpe", "pre_name"]

# as tokenizer.json spells them out
PRE: dict[str, list[dict[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ],
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": PATTERNS["llama-3"]}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}


def byte_level_bpe(
    pieces: Iterable[str], merges: list[tuple[str, str]], pre: str, special: Iterable[str], words: Iterable[str] = ()
) -> Backend:
    """A byte-level BPE backend.

    Args:
        pieces: the vocabulary in the order of its ids, bytes as printable characters.
        merges: in the order of their ranks.
        pre: a key of `PRE`. Llama 3's takes a word that is a piece as it is, whatever the merges say.
        special: which pieces are marks and not text.
        words: which pieces are never cut and stand outside the byte alphabet.
    """
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    backend = Backend(model)
    steps = [{"trim_offsets": True, **step} if step["type"] == "ByteLevel" else step for step in PRE[pre]]
    spec = json.loads(backend.to_str()) | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    spec["decoder"] = json.loads(decoders.ByteLevel().__getstate__())
    backend = Backend.from_str(json.dumps(spec))
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in words])
    return backend


def pre_name(backend: Backend) -> str | None:
    """llama.cpp's name of the pre-tokenizer, None where GGUF cannot express this one."""
    spec = json.loads(backend.to_str())
    first = spec["pre_tokenizer"] or {}
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in first.get("pretokenizers", [first])
    ]
    if spec["model"]["type"] != "BPE" or spec["normalizer"] is not None:
        return None
    return next((name for name, known in PRE.items() if known == steps), None)
