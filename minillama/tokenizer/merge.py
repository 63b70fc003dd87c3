"""Vocabulary extension: Chinese-LLaMA's merging of two vocabularies, and Ziya's added characters.

Existing ids are kept; new ones are appended. Chinese-LLaMA (Cui, Yang and Yao 2023, arXiv 2304.08177, §3.1):
every token piece of the second model that the first lacks is appended with score 0, so that it is merged before
any old one.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minillama.errors import InputError
from minillama.tokenizer import sentencepiece
from minillama.tokenizer.pre import STEPS, byte_level_bpe, steps_of
from minillama.tokenizer.sentencepiece_vocab import ModelKind, PieceType
from minillama.tokenizer.spec import read_bytes
from minillama.tokenizer.tokenizer import Tokenizer

LOST = ("Cc", "Cs", "Cn", "Co", "Zs", "Zl", "Zp")  # Unicode categories that are not learned


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
    special = list(special)
    if characters < 0:
        raise InputError(
            "not a number of characters", where="--add-characters", found=characters, expected="at least 0"
        )
    first, second = _model(base), _model(extra) if extra is not None else None
    if extra is not None and (first is None) != (second is None):
        kinds = ["SentencePiece" if m is not None else _kind(path) for m, path in ((first, base), (second, extra))]
        raise InputError(
            "these tokenizers are of different kinds and cannot be merged",
            found=f"{base}: {kinds[0]}; {extra}: {kinds[1]}",
            expected="two SentencePiece models (tokenizer.model), or two byte-level BPE vocabularies",
        )
    if first is None:
        if extra is None or characters or special:
            what = "to a vocabulary that is no SentencePiece model another one can be appended, and nothing else"
            raise InputError(what, where=base, fix="give EXTRA, without --add-characters and --special")
        old = Tokenizer.load(base)
        made = _merge_byte_level(old, Tokenizer.load(extra), base, extra)
        return Extended(made, made.vocab_size - old.vocab_size)
    return _extend_model(first, second, base, extra, characters, texts, special)


def _extend_model(
    first: Any,
    second: Any,
    base: str | Path,
    extra: str | Path | None,
    characters: int,
    texts: Iterable[str],
    special: Sequence[str],
) -> Extended:
    """`extend` for SentencePiece."""
    _check_base(first, base)
    old = Tokenizer.load(base)
    names = old.backend.get_vocab(with_added_tokens=True)
    added = {name for name, i in names.items() if i >= len(first.pieces)} - {piece.piece for piece in first.pieces}
    if added:
        what, found = "tokenizer.json has tokens that tokenizer.model lacks, whose ids would be reassigned", added
        raise InputError(what, where=base, found=", ".join(sorted(found)), fix="name the tokenizer.model itself")
    if extra is None and not characters and not special:
        raise InputError("nothing to append", where=base, fix="give EXTRA, --add-characters or --special")
    merged = found_characters = 0
    if second is not None:
        missing = _special(second) - _special(first)
        if missing:
            raise _mismatch(missing, base, extra)
        merged = _append(first, (p.piece for p in second.pieces if p.type not in (PieceType.BYTE, PieceType.UNUSED)))
    if characters:
        found_characters = _append(first, new_characters(texts, {piece.piece for piece in first.pieces})[:characters])
    for name in special:
        if not _append(first, [name], PieceType.CONTROL):
            raise InputError("the vocabulary has this token already", where=base, found=name)
    first.trainer_spec.vocab_size = len(first.pieces)
    parts = sentencepiece.parse(first.SerializeToString(), "the merged model")
    parts = replace(parts, add_bos=old.add_bos, config={"chat_template": old.chat_template})
    return Extended(Tokenizer.of(parts), merged, found_characters)


def new_characters(texts: Iterable[str], known: set[str]) -> list[str]:
    """New characters of the texts by frequency, ties by code point; no whitespace or control characters."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    wanted = (char for char in counts if char not in known and unicodedata.category(char) not in LOST)
    return sorted(wanted, key=lambda char: (-counts[char], char))


def _model(path: str | Path) -> Any:
    """The SentencePiece message of a file, or of a folder that holds one; None for another kind."""
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.model"
    if not file.is_file():
        Tokenizer.load(path)  # raises if there is no tokenizer
        return None
    data = read_bytes(file)
    return sentencepiece.message(data, file) if sentencepiece.is_sentencepiece(data) else None


def _kind(path: object) -> str:
    """The kind of a tokenizer, for a message."""
    tokenizer = Tokenizer.load(str(path))
    steps = steps_of(tokenizer.backend)
    pattern = next((name for name, known in STEPS.items() if known == steps), None)
    return (
        f"byte-level BPE, pattern {pattern}" if pattern else f"{type(tokenizer.backend.model).__name__}, not byte-level"
    )


def _check_base(model: Any, base: str | Path) -> None:
    if model.trainer_spec.model_type != ModelKind.BPE:
        kind = ModelKind(model.trainer_spec.model_type).name.lower()
        what = "token pieces can be added to a BPE model alone: its scores are ranks, not probabilities"
        raise InputError(what, where=base, found=kind, expected="a SentencePiece BPE model, as Llama 2's")


def _special(model: Any) -> set[str]:
    kinds = (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED)
    return {piece.piece for piece in model.pieces if piece.type in kinds}


def _mismatch(names: Iterable[str], base: object, extra: object) -> InputError:
    return InputError(
        "the special tokens do not match",
        where=extra,
        found=", ".join(sorted(names)),
        expected=f"only such as {base} has",
        fix="add them with --special, or train the second vocabulary without them",
    )


def _append(model: Any, pieces: Iterable[str], kind: PieceType = PieceType.NORMAL) -> int:
    """Add the missing token pieces with score 0; returns their number."""
    known, before = {piece.piece for piece in model.pieces}, len(model.pieces)
    for name in pieces:
        if name not in known:
            model.pieces.add(piece=name, score=0.0, type=int(kind))
            known.add(name)
    return len(model.pieces) - before


def _merge_byte_level(first: Tokenizer, second: Tokenizer, base: object, extra: object) -> Tokenizer:
    """The second's merges behind the first's, where both symbols of the pair are in the vocabulary by then."""
    patterns = [steps_of(tokenizer.backend) for tokenizer in (first, second)]
    if None in patterns or patterns[0] != patterns[1]:
        raise InputError(
            "these tokenizers cannot be merged",
            found=f"{base}: {_kind(base)}; {extra}: {_kind(extra)}",
            expected=f"two byte-level BPE vocabularies of one pattern, {', '.join(STEPS)}",
        )
    specs = [json.loads(tokenizer.backend.to_str()) for tokenizer in (first, second)]
    special = [{token["content"] for token in spec["added_tokens"]} for spec in specs]
    if special[1] - special[0]:
        raise _mismatch(special[1] - special[0], base, extra)
    table = first.backend.get_vocab(with_added_tokens=True)
    names = sorted(table, key=lambda name: table[name])
    if [table[name] for name in names] != list(range(len(names))):
        what = "this vocabulary has unassigned ids, and those behind them would move"
        raise InputError(what, where=base, found=f"{len(names)} tokens, the last at {max(table.values())}")
    merges = [(left, right) for left, right in specs[0]["model"]["merges"]]
    known, learned = set(names), set(merges)
    for left, right in specs[1]["model"]["merges"]:
        if (left, right) not in learned and left in known and right in known:
            merges.append((left, right))
            if left + right not in known:
                names.append(left + right)
                known.add(left + right)
    specials = [token["content"] for token in specs[0]["added_tokens"] if token["special"]]
    words = [token["content"] for token in specs[0]["added_tokens"] if not token["special"]]
    ignore = bool(specs[0]["model"].get("ignore_merges"))
    backend = byte_level_bpe(names, merges, patterns[0] or [], specials, words, ignore)
    config = {"chat_template": first.chat_template}
    return Tokenizer(backend, eos=first.eos_token, bos=first.bos_token, add_bos=first.add_bos, config=config)
