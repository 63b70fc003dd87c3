"""Segmentation trace: each step, by the reference algorithms on the tokenizer's own vocabulary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minillama.tokenizer.reference import bpe, byte_fallback, wordpiece
from minillama.tokenizer.reference.unigram import Unigram
from minillama.tokenizer.tokenizer import Tokenizer


@dataclass
class _Word:
    """The trace of a word, and its token pieces."""

    lines: list[str]
    pieces: list[str]


def explain(tokenizer: Tokenizer, text: str, n_best: int = 3) -> Iterator[str]:
    """Lines of the segmentation trace of a text.

    Normalization, words, then per word: BPE's merges with their ranks; or the unigram lattice with each
    token piece's ln p, the best segmentations and their posterior probabilities; or WordPiece's longest matches.
    The last line has the ids that the tokenizer itself gives. A line says where the steps do not lead there,
    because added tokens are split off first.

    Args:
        tokenizer: of any kind.
        text: the text to segment.
        n_best: segmentations shown for a unigram model.
    """
    backend = tokenizer.backend
    model: dict[str, Any] = json.loads(backend.to_str())["model"]
    ids = tokenizer.encode(text)
    normal = tokenizer.normalized(text)
    words = [normal]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]
    yield f"text        {text!r}"
    if normal != text:
        yield f"normalized  {normal!r}"
    yield f"model       {model['type']}, {tokenizer.vocab_size} tokens"
    yield f"words       {' '.join(map(_shown, words))}"
    trace = {"BPE": _bpe, "Unigram": _unigram(n_best), "WordPiece": _wordpiece}.get(model["type"], _lookup)
    pieces: list[str] = []
    for word in trace(model, words):
        yield ""
        yield from word.lines
        pieces += word.pieces
    names = [backend.id_to_token(i) or "" for i in ids]
    yield ""
    if names != pieces:
        why = "added tokens are cut out of the text first"
        if not tokenizer.is_exact:
            why = "SentencePiece itself cuts here, and took another of equal cuts, or a piece that is kept whole"
        yield f"(the steps give {' '.join(map(_shown, pieces))}: {why})"
    yield "ids         " + " ".join(f"{_shown(name)}={i}" for name, i in zip(names, ids, strict=True))


def _shown(piece: str) -> str:
    """A token piece with spaces and unprintable characters escaped."""
    return "".join(char if char.isprintable() and char != " " else ascii(char)[1:-1] for char in piece).replace(
        " ", "\\x20"
    )


def _bpe(model: dict[str, Any], words: list[str]) -> Iterator[_Word]:
    pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
    ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
    unknown_before = False
    for word in words:
        lines = [f"{_shown(word)}", f"  {'start':24} {' '.join(map(_shown, word))}"]

        def step(pair: bpe.Merge, symbols: list[str], lines: list[str] = lines) -> None:
            what = f"merge {ranks[pair]}: {_shown(pair[0])} + {_shown(pair[1])}"
            lines.append(f"  {what:24} {' '.join(map(_shown, symbols))}")

        if model.get("ignore_merges") and word in model["vocab"]:
            lines.append("  the whole word is a piece")
            symbols = [word]
        else:
            symbols = bpe.encode(word, ranks, step)
        pieces: list[str] = []
        for symbol in symbols:
            unknown_before = _append(pieces, symbol, model, lines, unknown_before and bool(model.get("fuse_unk")))
        yield _Word(lines, pieces)


def _append(pieces: list[str], symbol: str, model: dict[str, Any], lines: list[str], fuse: bool) -> bool:
    """Append a symbol, its byte fallback, or the unknown token; returns whether it is unknown."""
    if symbol in model["vocab"]:
        pieces.append(symbol)
        return False
    data = byte_fallback.spell([symbol], model["vocab"])
    if model.get("byte_fallback") and all(piece in model["vocab"] for piece in data):
        lines.append(f"  {_shown(symbol)} is no piece: bytes  {' '.join(data)}")
        pieces += data
        return False
    lines.append(f"  {_shown(symbol)} is no piece: {model['unk_token']}")
    if model["unk_token"] is not None and not fuse:
        pieces.append(model["unk_token"])
    return True


def _unigram(n_best: int) -> Any:
    def trace(model: dict[str, Any], words: list[str]) -> Iterator[_Word]:
        scores = {piece: score for piece, score in model["vocab"] if piece}
        names = [piece for piece, _ in model["vocab"]]
        table = {"vocab": scores, "byte_fallback": model["byte_fallback"], "unk_token": names[model["unk_id"] or 0]}
        reader, unknown_before = Unigram(scores), False
        for word in words:
            lines = [_shown(word), "  lattice (from-to piece ln p)"]
            for start, end, score in sorted(reader.edges(word)):
                note = "" if word[start:end] in scores else " (unknown)"
                lines.append(f"    {start}-{end} {_shown(word[start:end])} {score:.4f}{note}")
            total = reader.log_partition(word)
            lines.append("  best cuts (ln P, share of all cuts)")
            for parts, value in reader.n_best(word, n_best):
                share = math.exp(value - total)
                lines.append(f"    {value:.4f} {share:7.2%}  {' '.join(map(_shown, parts))}")
            pieces: list[str] = []
            for piece in reader.encode(word):
                unknown_before = _append(pieces, piece, table, lines, unknown_before)
            yield _Word(lines, pieces)

    return trace


def _wordpiece(model: dict[str, Any], words: list[str]) -> Iterator[_Word]:
    prefix = model["continuing_subword_prefix"]
    for word in words:
        pieces = wordpiece.encode(word, model["vocab"], model["unk_token"], model["max_input_chars_per_word"], prefix)
        lines, rest = [_shown(word)], word
        for piece in pieces:
            if piece == model["unk_token"]:
                lines.append(f"  no piece fits somewhere in {_shown(word)}: the whole word is {piece}")
                break
            length = len(piece.removeprefix(prefix) if rest != word else piece)
            lines.append(f"  longest piece of {_shown(rest):20} {piece}")
            rest = rest[length:]
        yield _Word(lines, pieces)


def _lookup(model: dict[str, Any], words: list[str]) -> Iterator[_Word]:
    for word in words:
        known = word in model["vocab"]
        line = f"{_shown(word)}  {'is a piece' if known else 'is no piece: ' + model['unk_token']}"
        yield _Word([line], [word if known else model["unk_token"]])
