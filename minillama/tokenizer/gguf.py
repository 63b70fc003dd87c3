"""The vocabulary inside a GGUF file (`tokenizer.*` keys), out and in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.formats.gguf_header import read_header
from minillama.tokenizer.bytelevel import BYTE_TO_CHAR
from minillama.tokenizer.parts import Parts
from minillama.tokenizer.pieces import Pieces, PieceType
from minillama.tokenizer.pre import PRE, byte_level_bpe, pre_name

__all__ = ["read", "vocabulary"]

PREFIX = "tokenizer.ggml."


def read(file: Path) -> Parts:
    """Read the vocabulary and the chat template.

    Raises:
        InputError: a damaged file, or a kind of tokenizer that is not known.
    """
    metadata = read_header(file).metadata
    own = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    kind, names = own.get("model"), own.get("tokens")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError("the file holds no vocabulary", where=f"{file}, {PREFIX}tokens")
    types = _numbers(own, "token_type", names, file, PieceType.NORMAL)
    if kind == "llama":
        scores = _numbers(own, "scores", names, file, 0.0)
        backend = Pieces(names, scores, types, dummy_prefix=bool(own.get("add_space_prefix", True))).backend()
        defaults, add_bos = (1, 2), True
    elif kind == "gpt2":
        backend = _byte_level(own, names, types, file)
        defaults, add_bos = (11, 11), own["pre"] == "llama-bpe"  # llama.cpp, src/llama-vocab.cpp
    else:
        where = f"{file}, {PREFIX}model"
        raise InputError("this kind of tokenizer is not supported", where=where, found=kind, expected="llama or gpt2")
    bos, eos = (_named(own, key, default, names, file) for key, default in zip(("bos", "eos"), defaults, strict=True))
    template = metadata.get("tokenizer.chat_template")
    config = {"chat_template": template} if isinstance(template, str) else {}
    return Parts(backend, eos, bos, bool(own.get("add_bos_token", add_bos)), config)


def _byte_level(own: Mapping[str, Any], names: list[str], types: list[Any], file: Path) -> Backend:
    pre = own.get("pre")
    if pre not in PRE:
        where = f"{file}, {PREFIX}pre"
        raise InputError("this pre-tokenizer is not known", where=where, found=pre, expected=", ".join(PRE))
    known = set(names)
    merges = [tuple(pair.split(" ")) for pair in own.get("merges", [])]
    sound = [pair for pair in merges if len(pair) == 2 and known >= {pair[0], pair[1], pair[0] + pair[1]}]
    special = [name for name, kind in zip(names, types, strict=True) if kind in (PieceType.CONTROL, PieceType.UNKNOWN)]
    words = [name for name, kind in zip(names, types, strict=True) if kind == PieceType.USER_DEFINED]
    return byte_level_bpe(names, [(pair[0], pair[1]) for pair in sound], pre, special, words)


def _numbers(own: Mapping[str, Any], key: str, names: list[str], file: Path, default: float) -> list[Any]:
    values = own.get(key)
    if values is None:
        return [default] * len(names)
    if len(values) != len(names) or isinstance(values, (str, list)):
        where, expected = f"{file}, {PREFIX}{key}", f"{len(names)} numbers, one a token"
        raise InputError("not one number a token", where=where, found=len(values), expected=expected)
    return list(values.tolist())


def _named(own: Mapping[str, Any], key: str, default: int, names: list[str], file: Path) -> str:
    index = own.get(f"{key}_token_id", default)
    if not isinstance(index, int) or not 0 <= index < len(names):
        where = f"{file}, {PREFIX}{key}_token_id"
        raise InputError(
            "this token is not in the vocabulary", where=where, found=index, expected=f"below {len(names)}"
        )
    return names[index]


def vocabulary(
    backend: Backend, rows: int, bos_id: int, eos_id: int, add_bos: bool, template: str | None
) -> dict[str, Any]:
    """The keys for a model with so many rows of embedding; rows without a token get an unused one.

    Raises:
        InputError: llama.cpp has no tokenizer that cuts so.
    """
    pieces, pre = Pieces.of(backend), pre_name(backend)
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
            expected=f"byte-level BPE cut as {', '.join(PRE)}, or SentencePiece's BPE with byte fallback",
        )
    if len(names) > rows:
        found, expected = f"{len(names)} tokens", f"at most the {rows} rows of the embedding"
        raise InputError("the tokenizer is larger than the model's vocabulary", found=found, expected=expected)
    values["tokens"] = names + [f"[PAD{i}]" for i in range(len(names), rows)]
    values["token_type"] = [int(kind) for kind in types] + [int(PieceType.UNUSED)] * (rows - len(names))
    values |= {"bos_token_id": bos_id, "eos_token_id": eos_id, "add_bos_token": add_bos}
    keys = {PREFIX + key: value for key, value in values.items()}
    return keys | ({"tokenizer.chat_template": template} if template else {})


def _listed(backend: Backend, spec: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    table = {index: name for name, index in backend.get_vocab(with_added_tokens=True).items()}
    added = {token["content"]: token["special"] for token in spec["added_tokens"]}
    names = [table.get(i, f"[PAD{i}]") for i in range(max(table) + 1)]
    kinds = {True: PieceType.CONTROL, False: PieceType.USER_DEFINED}
    types = [kinds[added[name]] if name in added else PieceType.NORMAL for name in names]
    return names, [int(PieceType.UNUSED) if i not in table else int(kind) for i, kind in enumerate(types)]
