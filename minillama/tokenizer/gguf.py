"""GGUF vocabulary import (`tokenizer.*` keys)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from minillama.errors import InputError
from minillama.formats.gguf_header import GGUFHeader, read_header
from minillama.tokenizer import sentencepiece
from minillama.tokenizer.pre import PRE, byte_level_bpe
from minillama.tokenizer.sentencepiece_vocab import Pieces, PieceType
from minillama.tokenizer.spec import Parts

PREFIX, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
END_OF_TURN = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>", "[e~["}
    | {"<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]"}
    | {"<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"}
)
"""Names at which llama.cpp stops, whatever ids a file gives (src/llama-vocab.cpp); besides those of infilling."""
_HARMONY = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})  # where <|end|> ends a part of a turn


def read(file: Path) -> Parts:
    """Read the vocabulary, the chat templates, and the tokens that end a turn.

    Raises:
        InputError: a damaged file, or an unknown tokenizer model.
    """
    header = read_header(file)
    names = header.get(f"{PREFIX}tokens", list)
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError("the file holds no vocabulary", where=f"{file}, {PREFIX}tokens")
    kind = header.get(f"{PREFIX}model", str)
    types = _numbers(header, "token_type", names, PieceType.NORMAL)
    scores = _numbers(header, "scores", names, 0.0)
    pieces = Pieces(names, scores, types, dummy_prefix=header.get(f"{PREFIX}add_space_prefix", bool, True))
    if kind == "llama":
        backend, bos, eos, add_bos = pieces.backend(), _name(header, "bos", 1), _name(header, "eos", 2), True
    elif kind == "gpt2":
        pre = header.get(f"{PREFIX}pre", str)
        backend = _byte_level(header, pre, pieces)
        bos, eos, add_bos = _name(header, "bos"), _name(header, "eos", 11), PRE[pre] == "llama-3"  # as llama.cpp
    else:
        where = f"{file}, {PREFIX}model"
        raise InputError("this kind of tokenizer is not supported", where=where, found=kind, expected="llama or gpt2")
    model, encoder = b"", None
    if kind == "llama" and not pieces.has_characters:
        model = sentencepiece.serialize(pieces, names.index(bos or eos or ""), names.index(eos or ""))
        encoder = sentencepiece.parse(model, file).encoder
    stops = [name for key in ("eot", "eom") if (name := _name(header, key))]
    stops += end_of_turn(names)
    add_bos = bos is not None and header.get(f"{PREFIX}add_bos_token", bool, add_bos)
    return Parts(backend, eos or "", bos, add_bos, {"chat_template": _templates(header)}, model, encoder, stops)


def end_of_turn(names: Iterable[str]) -> frozenset[str]:
    """Tokens of a vocabulary at which llama.cpp stops by their name."""
    found = END_OF_TURN.intersection(names)
    return found - {"<|end|>"} if any(found >= pair for pair in _HARMONY) else found


def _templates(header: GGUFHeader) -> dict[str, str]:
    """Chat templates by name."""
    names = [name for name in header.get(f"{TEMPLATE}s", list, []) if isinstance(name, str)]
    keys = {"default": TEMPLATE} | {name: f"{TEMPLATE}.{name}" for name in names}
    return {name: header.get(key, str) for name, key in keys.items() if key in header.metadata}


def _byte_level(header: GGUFHeader, pre: str, pieces: Pieces) -> Backend:
    if pre not in PRE:
        where = f"{header.path}, {PREFIX}pre"
        raise InputError("this pre-tokenizer is not known", where=where, found=pre, expected=", ".join(PRE))
    known = set(pieces.names)
    pairs = (str(pair).partition(" ") for pair in header.get(f"{PREFIX}merges", list, []))
    merges = [(left, right) for left, _, right in pairs if known >= {left, right, left + right}]
    special = pieces.of_type(PieceType.CONTROL, PieceType.UNKNOWN)
    words = pieces.of_type(PieceType.USER_DEFINED)
    is_llama_3 = PRE[pre] == "llama-3"
    backend = byte_level_bpe(pieces.names, merges, PRE[pre], special, words, ignore_merges=is_llama_3)
    if PRE[pre] == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _numbers(header: GGUFHeader, key: str, names: list[str], default: float) -> list[Any]:
    values = header.metadata.get(PREFIX + key)
    if values is None:
        return [default] * len(names)
    if not isinstance(values, np.ndarray) or len(values) != len(names):
        where, expected = f"{header.path}, {PREFIX}{key}", f"{len(names)} numbers, one per token"
        raise InputError("not one number per token", where=where, expected=expected)
    return list(values.tolist())


def _name(header: GGUFHeader, key: str, default: int | None = None) -> str | None:
    """Name of a special token, None where the file has neither its id nor a default."""
    names, where = header.get(f"{PREFIX}tokens", list), f"{PREFIX}{key}_token_id"
    if default is None and where not in header.metadata:
        return None
    index = header.get(where, int, default)
    if not 0 <= index < len(names):
        where, expected = f"{header.path}, {PREFIX}{key}_token_id", f"below {len(names)}"
        raise InputError("this token is not in the vocabulary", where=where, found=index, expected=expected)
    return names[index]
