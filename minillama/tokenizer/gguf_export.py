"""GGUF vocabulary export (`tokenizer.*` keys)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillama.errors import InputError
from minillama.tokenizer.gguf import PREFIX
from minillama.tokenizer.pre import BYTE_TO_CHAR, PRE
from minillama.tokenizer.sentencepiece_vocab import PieceType
from minillama.tokenizer.spec import by_id, to_dict
from minillama.tokenizer.tokenizer import Tokenizer


def vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The keys for an embedding of `rows` rows; rows without a token get an unused one.

    Raises:
        InputError: llama.cpp has no equivalent tokenizer.
    """
    pieces = tokenizer.pieces
    if pieces is None and tokenizer.pre is None:
        raise InputError(
            "GGUF cannot express this tokenizer",
            found=type(tokenizer.backend.model).__name__,
            expected=f"byte-level BPE of pattern {', '.join(PRE)}, or SentencePiece's BPE with byte fallback",
        )
    tokenizer.check_fits(rows)
    types: Mapping[int, int]
    if pieces is not None:
        names, types = dict(enumerate(pieces.names)), dict(enumerate(pieces.types))
        values = {"model": "llama", "pre": "default", "add_space_prefix": pieces.dummy_prefix}
        values["scores"] = [*pieces.scores, *[-1e9] * (rows - len(names))]
    else:
        names, spec = by_id(tokenizer.backend), to_dict(tokenizer.backend)
        special = {token["content"]: token["special"] for token in spec["added_tokens"]}
        kinds = {None: PieceType.NORMAL, True: PieceType.CONTROL, False: PieceType.USER_DEFINED}
        types = {i: kinds[special.get(name)] for i, name in names.items()}
        merges = [" ".join(pair) for pair in spec["model"]["merges"]]
        # a list without entries is not written, and then llama.cpp finds none
        merges = merges or [f"{BYTE_TO_CHAR[0]} {BYTE_TO_CHAR[0]}"]
        values = {"model": "gpt2", "pre": tokenizer.pre, "merges": merges}
    values["tokens"] = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    values["token_type"] = [int(types.get(i, PieceType.UNUSED)) for i in range(rows)]
    values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "add_bos_token": tokenizer.add_bos}
    keys = {PREFIX + key: value for key, value in values.items()}
    template = tokenizer.chat_template
    return keys | ({"tokenizer.chat_template": template} if template else {})
