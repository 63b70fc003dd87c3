"""GGUF vocabulary export (`tokenizer.*` keys)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.tokenizer.gguf import PREFIX
from minillama.tokenizer.pre import BYTE_TO_CHAR, PRE
from minillama.tokenizer.sentencepiece_vocab import PieceType
from minillama.tokenizer.tokenizer import Tokenizer


def vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The keys for an embedding of `rows` rows; rows without a token get an unused one.

    Raises:
        InputError: llama.cpp has no equivalent tokenizer.
    """
    backend, pieces, pre = tokenizer.backend, tokenizer.pieces, tokenizer.pre
    values: dict[str, Any] = {}
    if pieces is not None:
        names, types = list(pieces.names), list(pieces.types)
        padding = [-1e9] * (rows - len(names))
        values |= {"model": "llama", "pre": "default", "scores": [*pieces.scores, *padding]}
        values["add_space_prefix"] = pieces.dummy_prefix
    elif pre is not None:
        spec = json.loads(backend.to_str())
        names, types = _listed(backend, spec)
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in spec["model"]["merges"]]
        # a list without entries is not written, and then llama.cpp finds none
        values |= {"model": "gpt2", "pre": pre, "merges": merges or [f"{BYTE_TO_CHAR[0]} {BYTE_TO_CHAR[0]}"]}
    else:
        raise InputError(
            "GGUF cannot express this tokenizer",
            found=type(backend.model).__name__,
            expected=f"byte-level BPE of pattern {', '.join(PRE)}, or SentencePiece's BPE with byte fallback",
        )
    if len(names) > rows:
        found, expected = f"{len(names)} tokens", f"at most the {rows} rows of the embedding"
        raise InputError("the tokenizer is larger than the model's vocabulary", found=found, expected=expected)
    values["tokens"] = names + [f"[PAD{i}]" for i in range(len(names), rows)]
    values["token_type"] = [int(kind) for kind in types] + [int(PieceType.UNUSED)] * (rows - len(names))
    values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "add_bos_token": tokenizer.add_bos}
    template = tokenizer.chat_template
    keys = {PREFIX + key: value for key, value in values.items()}
    return keys | ({"tokenizer.chat_template": template} if template else {})


def _listed(backend: Backend, spec: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    table = {index: name for name, index in backend.get_vocab(with_added_tokens=True).items()}
    added = {token["content"]: token["special"] for token in spec["added_tokens"]}
    names = [table.get(i, f"[PAD{i}]") for i in range(max(table) + 1)]
    kinds = {True: PieceType.CONTROL, False: PieceType.USER_DEFINED}
    types = [kinds[added[name]] if name in added else PieceType.NORMAL for name in names]
    return names, [int(PieceType.UNUSED) if i not in table else int(kind) for i, kind in enumerate(types)]
