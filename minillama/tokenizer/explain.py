"""Segmentation trace: each step, by the reference algorithms on the tokenizer's own vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

from minillama.tokenizer.reference import bpe, byte_fallback, wordpiece
from minillama.tokenizer.reference.unigram import Unigram
from minillama.tokenizer.spec import to_dict
from minillama.tokenizer.tokenizer import Tokenizer

Steps = Iterator[tuple[list[str], list[str]]]  # the lines of each word, and its token pieces
Trace = Callable[[dict[str, Any], list[str]], Steps]


def explain(tokenizer: Tokenizer, text: str, n_best: int = 3) -> Iterator[str]:
    """Lines of the segmentation trace of a text.

    Normalization, words, then per word: BPE's merges with their ranks; or the unigram lattice with each
    token piece's ln p, the best segmentations and their posterior probabilities; or WordPiece's longest matches.
    The last line has the ids that the tokenizer itself gives. A line says where the steps do not lead there,
    because added tokens are split off first.

    `n_best` segmentations are shown for a unigram model.
    """
    backend, ids, normal = tokenizer.backend, tokenizer.encode(text), tokenizer.normalized(text)
    model: dict[str, Any] = to_dict(backend)["model"]
    words = [normal]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]
    yield f"text        {text!r}"
    if normal != text:
        yield f"normalized  {normal!r}"
    yield f"model       {model['type']}, {tokenizer.vocab_size} tokens"
    yield f"words       {_shown(words)}"
    traces: dict[str, Trace] = {"BPE": _bpe, "Unigram": partial(_unigram, n_best=n_best), "WordPiece": _wordpiece}
    pieces: list[str] = []
    for lines, found in traces.get(model["type"], _lookup)(model, words):
        yield from ["", *lines]
        pieces += found
    if model["type"] == "Unigram" or model.get("fuse_unk"):
        unknown = backend.id_to_token(tokenizer.unknown_id or 0)
        pieces = [piece for i, piece in enumerate(pieces) if piece != unknown or pieces[i - 1 : i] != [unknown]]
    names = [backend.id_to_token(i) or "" for i in ids]
    yield ""
    if names != pieces:
        why = "added tokens are split off first"
        if not tokenizer.is_exact:
            why = "SentencePiece's own encoder took another of equal segmentations, or a user-defined token piece"
        yield f"(the steps give {_shown(pieces)}: {why})"
    yield "ids         " + " ".join(f"{_escaped(name)}={i}" for name, i in zip(names, ids, strict=True))


def _escaped(piece: str) -> str:
    """A token piece with spaces and unprintable characters escaped."""
    shown = (char if char.isprintable() else ascii(char)[1:-1] for char in piece)
    return "".join(shown).replace(" ", "\\x20")


def _shown(pieces: list[str]) -> str:
    return " ".join(map(_escaped, pieces))


def _bpe(model: dict[str, Any], words: list[str]) -> Steps:
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    for word in words:
        lines = [_escaped(word), f"  {'start':24} {_shown(list(word))}"]

        def step(pair: bpe.Merge, symbols: list[str], lines: list[str] = lines) -> None:
            what = f"merge {ranks[pair]}: {_escaped(pair[0])} + {_escaped(pair[1])}"
            lines.append(f"  {what:24} {_shown(symbols)}")

        symbols = [word]
        if model["ignore_merges"] and word in model["vocab"]:
            lines.append("  the whole word is in the vocabulary")
        else:
            symbols = bpe.encode(word, ranks, step)
        yield lines, _known(symbols, model["vocab"], model["byte_fallback"], model["unk_token"], lines)


def _known(
    symbols: list[str], vocab: Container[str], has_bytes: bool, unknown: str | None, lines: list[str]
) -> list[str]:
    """The symbols, with the byte tokens or the unknown token of those outside the vocabulary."""
    pieces: list[str] = []
    for symbol in symbols:
        spelled = byte_fallback.encode([symbol], vocab) if has_bytes else [symbol]
        if not all(piece in vocab for piece in spelled):
            lines.append(f"  {_escaped(symbol)} is unknown: {unknown}")
            spelled = [unknown] if unknown is not None else []
        elif symbol not in vocab:
            lines.append(f"  {_escaped(symbol)} is unknown: bytes  {' '.join(spelled)}")
        pieces += spelled
    return pieces


def _unigram(model: dict[str, Any], words: list[str], n_best: int) -> Steps:
    names = [piece for piece, _ in model["vocab"]]
    scores = {piece: score for piece, score in model["vocab"] if piece}
    reference = Unigram(scores)
    for word in words:
        lines = [_escaped(word), "  lattice (from-to piece ln p)"]
        for start, end, score in sorted(reference.edges(word)):
            note = "" if word[start:end] in scores else " (unknown)"
            lines.append(f"    {start}-{end} {_escaped(word[start:end])} {score:.4f}{note}")
        total = reference.log_partition(word)
        lines.append("  best segmentations (ln P, posterior)")
        for parts, value in reference.n_best(word, n_best):
            lines.append(f"    {value:.4f} {math.exp(value - total):7.2%}  {_shown(parts)}")
        unknown = names[model["unk_id"] or 0]
        yield lines, _known(reference.encode(word), scores, model["byte_fallback"], unknown, lines)


def _wordpiece(model: dict[str, Any], words: list[str]) -> Steps:
    prefix, unknown = model["continuing_subword_prefix"], model["unk_token"]
    for word in words:
        pieces = wordpiece.encode(word, model["vocab"], unknown, model["max_input_chars_per_word"], prefix)
        lines, rest = [_escaped(word)], word
        for piece in pieces:
            if piece == unknown:
                lines.append(f"  no match somewhere in {_escaped(word)}: the whole word is {piece}")
                break
            lines.append(f"  longest match in {_escaped(rest):20} {piece}")
            rest = rest[len(piece if rest == word else piece.removeprefix(prefix)) :]
        yield lines, pieces


def _lookup(model: dict[str, Any], words: list[str]) -> Steps:
    for word in words:
        piece = word if word in model["vocab"] else model["unk_token"]
        yield [f"{_escaped(word)}  {'in the vocabulary' if piece == word else f'unknown: {piece}'}"], [piece]
