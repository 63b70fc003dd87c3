"""Vocabulary extension: Chinese-LLaMA's merging of two vocabularies, and Ziya's added characters.

Existing ids are kept; new ones are appended. Chinese-LLaMA (Cui, Yang and Yao 2023, arXiv 2304.08177, §3.1):
every token piece of the second model that the first lacks is appended with score 0, so that it is merged before
any old one.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minillama.errors import InputError
from minillama.files import read_bytes
from minillama.tokenizer import sentencepiece
from minillama.tokenizer.pre import byte_level_bpe, pattern_of
from minillama.tokenizer.reference.splitting import by_frequency
from minillama.tokenizer.sentencepiece_vocab import ModelKind, PieceType
from minillama.tokenizer.spec import FIX, LARGEST, by_id, to_dict
from minillama.tokenizer.tokenizer import Tokenizer

SENTENCEPIECE, BYTE_LEVEL = "SentencePiece model", "byte-level BPE"
NOT_LEARNED = ("Cc", "Cs", "Cn", "Co", "Zs", "Zl", "Zp")  # Unicode categories that are not learned


@dataclass(frozen=True)
class Extended:
    """An extended vocabulary, with the number of token pieces merged, and of characters added."""

    tokenizer: Tokenizer
    merged: int = 0
    characters: int = 0


def extend(
    base: str | Path,
    extra: str | Path | None = None,
    characters: int = 0,
    texts: Iterable[str] = (),
    special: Iterable[str] = (),
) -> Extended:
    """Append token pieces to a vocabulary: another's, then characters, then special tokens.

    Args:
        base: a SentencePiece BPE model, or byte-level BPE; a file or folder.
        extra: SentencePiece of any kind, or byte-level BPE with the pre-tokenizer of the base.
        characters: append so many of the most frequent new characters of `texts`, as Ziya-LLaMA
            was given 7,410; fewer where the texts hold no more.
        texts: corpus in which characters are counted.
        special: names of special tokens, such as the `[PAD]` that makes Chinese-LLaMA's vocabulary Chinese-Alpaca's.

    Raises:
        InputError: the two are of different kinds, or the second has special tokens that the first lacks, or
            a special token is there already; a byte-level base takes neither characters nor special tokens.
    """
    special, kind = list(special), _kind(base)
    if characters < 0:
        what, where = "not a number of characters", "--add-characters"
        raise InputError(what, where=where, found=characters, expected="at least 0")
    if extra is not None and (_kind(extra) != kind or not kind.startswith((SENTENCEPIECE, BYTE_LEVEL))):
        what = "these tokenizers are of different kinds and cannot be merged"
        expected = f"two {SENTENCEPIECE}s (tokenizer.model), or two vocabularies of {BYTE_LEVEL} and one pattern"
        raise InputError(what, found=f"{base}: {kind}; {extra}: {_kind(extra)}", expected=expected)
    if kind == SENTENCEPIECE:
        return _extend_sentencepiece(base, extra, characters, texts, special)
    if extra is None or characters or special:
        what = "to a vocabulary that is no SentencePiece model another one can be appended, and nothing else"
        raise InputError(what, where=base, fix="give EXTRA, without --add-characters and --special")
    return _extend_byte_level(base, extra)


def _extend_sentencepiece(
    base: str | Path, extra: str | Path | None, characters: int, texts: Iterable[str], special: Sequence[str]
) -> Extended:
    model = _model(base)
    if model.trainer_spec.model_type != ModelKind.BPE:
        kind = ModelKind(model.trainer_spec.model_type).name.lower()
        what = "token pieces can be added to a BPE model alone: its scores are ranks, not probabilities"
        raise InputError(what, where=base, found=kind, expected="a SentencePiece BPE model, as Llama 2's")
    old, known, count = Tokenizer.load(base), _names(model), len(model.pieces)
    added = sorted(name for i, name in by_id(old.backend).items() if i >= count and name not in known)
    if added:
        what = "tokenizer.json has tokens that tokenizer.model lacks, whose ids would be reassigned"
        raise InputError(what, where=base, found=", ".join(added), fix="name the tokenizer.model itself")
    if extra is None and not characters and not special:
        raise InputError("nothing to append", where=base, fix="give EXTRA, --add-characters or --special")
    merged = found = 0
    if extra is not None:
        other = _model(extra)
        kinds = PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED
        _check_special(_names(model, kinds), _names(other, kinds), base, extra)
        pieces = (piece for piece in other.pieces if piece.type not in (PieceType.BYTE, PieceType.UNUSED))
        merged = _append(model, (piece.piece for piece in pieces))
    if characters:
        found = _append(model, new_characters(texts, _names(model))[:characters])
    for name in special:
        if not _append(model, [name], PieceType.CONTROL):
            raise InputError("the vocabulary has this token already", where=base, found=name)
    model.trainer_spec.vocab_size = len(model.pieces)
    parts = sentencepiece.parse(model.SerializeToString(), "the merged model")
    parts = replace(parts, add_bos=old.add_bos, config={"chat_template": old.chat_templates})
    return Extended(Tokenizer.of(parts), merged, found)


def _extend_byte_level(base: str | Path, extra: str | Path) -> Extended:
    """The second's merges behind the first's, where both symbols of the pair are in the vocabulary by then."""
    first, second = Tokenizer.load(base), Tokenizer.load(extra)
    spec, other = to_dict(first.backend), to_dict(second.backend)
    own, others = ({token["content"] for token in tokens["added_tokens"]} for tokens in (spec, other))
    _check_special(own, others, base, extra)
    table = by_id(first.backend)
    if max(table) >= len(table):
        what = "this vocabulary has unassigned ids, and those behind them would move"
        raise InputError(what, where=base, found=f"{len(table)} tokens, the last at {max(table)}")
    names = dict.fromkeys(table.values())
    merges = dict.fromkeys((left, right) for left, right in spec["model"]["merges"])
    for left, right in other["model"]["merges"]:
        if left in names and right in names:
            merges[left, right] = None
            names[left + right] = None
    special = [token["content"] for token in spec["added_tokens"] if token["special"]]
    words = [token["content"] for token in spec["added_tokens"] if not token["special"]]
    pattern = pattern_of(first.backend)
    assert pattern is not None  # as `extend` has found
    backend = byte_level_bpe(names, list(merges), pattern, special, words, spec["model"]["ignore_merges"])
    made = Tokenizer.of(replace(first.parts, backend=backend, config={"chat_template": first.chat_templates}))
    return Extended(made, made.vocab_size - first.vocab_size)


def new_characters(texts: Iterable[str], known: set[str]) -> list[str]:
    """New characters of the texts by frequency, ties by code point; no whitespace or control characters."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return [c for c in by_frequency(counts) if c not in known and unicodedata.category(c) not in NOT_LEARNED]


def _kind(path: str | Path) -> str:
    if _model(path) is not None:
        return SENTENCEPIECE
    backend = Tokenizer.load(path).backend
    pattern = pattern_of(backend)
    return f"{BYTE_LEVEL}, pattern {pattern}" if pattern else f"{type(backend.model).__name__}, not byte-level"


def _model(path: str | Path) -> Any:
    """The SentencePiece message of a file, or of a folder that holds one; None for another kind."""
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.model"
    if not file.is_file():
        return None
    data = read_bytes(file, FIX, LARGEST)
    return sentencepiece.message(data, file) if sentencepiece.is_sentencepiece(data) else None


def _names(model: Any, kinds: Sequence[PieceType] = tuple(PieceType)) -> set[str]:
    """Token pieces of these types."""
    return {piece.piece for piece in model.pieces if piece.type in kinds}


def _append(model: Any, names: Iterable[str], kind: PieceType = PieceType.NORMAL) -> int:
    """Add the missing token pieces with score 0; returns their number."""
    known, before = _names(model), len(model.pieces)
    for name in dict.fromkeys(names):
        if name not in known:
            model.pieces.add(piece=name, score=0.0, type=int(kind))
    return len(model.pieces) - before


def _check_special(own: set[str], others: set[str], base: object, extra: object) -> None:
    if others - own:
        found, expected = ", ".join(sorted(others - own)), f"only such as {base} has"
        fix = "add them with --special, or train the second vocabulary without them"
        raise InputError("the special tokens do not match", where=extra, found=found, expected=expected, fix=fix)
