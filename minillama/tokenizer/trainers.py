"""Vocabulary trainers: the libraries, and the reference algorithms.

Both have one interface, so that `backends.py` makes the tokenizer in either case. BPE and byte-level BPE give
the same merges in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend
from tokenizers import models, trainers

from minillama.errors import InputError
from minillama.tokenizer import backends, sentencepiece, sentencepiece_training
from minillama.tokenizer.hf_json import END_OF_TEXT
from minillama.tokenizer.pre import BYTE_TO_CHAR
from minillama.tokenizer.reference import bpe, unigram, wordpiece
from minillama.tokenizer.reference.byte_bpe import ByteBPE
from minillama.tokenizer.reference.splitting import count_words
from minillama.tokenizer.reference.wordpiece import CONTINUATION
from minillama.tokenizer.sentencepiece_vocab import MARKS

ENDS = 3  # <unk>, <s>, </s>
PRIVATE = 0xF0000  # the first of 65,534 private-use characters
RARE = 2  # minimum pair frequency
SPECIAL = (backends.WORDPIECE_UNKNOWN, END_OF_TEXT)
Merges = list[tuple[str, str]]
Ties = bpe.Ties


class Learner(Protocol):
    """Vocabulary trainer. Sizes exclude special tokens and bytes, except wordpiece's."""

    def words(self, texts: Iterable[str], size: int | None) -> list[str]:
        """The most frequent words, all of them for None."""

    def wordpiece(self, texts: Iterable[str], size: int) -> list[str]:
        """Token pieces, special tokens first."""

    def unigram(self, texts: Iterable[str], size: int) -> dict[str, float]:
        """Token piece -> ln p."""

    def bpe(self, texts: Iterable[str], size: int) -> tuple[list[str], Merges]:
        """Alphabet and merges."""

    def byte_bpe(self, texts: Iterable[str], size: int, pattern: str) -> Merges:
        """Merges of bytes as printable characters."""


class Library:
    """The trainers of the Rust library, and SentencePiece's."""

    def words(self, texts: Iterable[str], size: int | None) -> list[str]:
        """WordLevelTrainer."""
        backend = Backend(models.WordLevel(unk_token=backends.UNKNOWN))
        backend.pre_tokenizer = backends.splitter("words")
        limit = 2**31 if size is None else size
        trainer = trainers.WordLevelTrainer(vocab_size=limit, min_frequency=0, show_progress=False, special_tokens=[])
        backend.train_from_iterator(texts, trainer)
        return _by_id(backend.get_vocab())

    def wordpiece(self, texts: Iterable[str], size: int) -> list[str]:
        """BpeTrainer on words whose later characters are continuation symbols.

        As WordPieceTrainer, which numbers these symbols at random and so breaks ties at random.
        """
        words = count_words(texts, "bert")
        later = sorted({char for word in words for char in word[1:]})
        inner = {ord(char): chr(PRIVATE + i) for i, char in enumerate(later)}
        shown = {PRIVATE + i: char for i, char in enumerate(later)}
        backend = Backend(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size - len(SPECIAL),
            min_frequency=RARE,
            initial_alphabet=sorted({char for word in words for char in word}),
            show_progress=False,
        )
        spelled = (w[0] + w[1:].translate(inner) for w, count in words.items() for _ in range(count))
        backend.train_from_iterator(spelled, trainer)
        pieces = [CONTINUATION + piece if ord(piece[0]) in shown else piece for piece in _by_id(backend.get_vocab())]
        _check_size(len(pieces) + len(SPECIAL), size, 0)
        return [*SPECIAL, *(piece.translate(shown) for piece in pieces)]

    def unigram(self, texts: Iterable[str], size: int) -> dict[str, float]:
        """SentencePiece's trainer; the tokenizers library's is not deterministic."""
        data = sentencepiece_training.train(
            texts, size + ENDS, "unigram", "identity", 1.0, rest=backends.RESERVED - ENDS
        )
        pieces = sentencepiece.pieces_of(sentencepiece.message(data, "the trained model"), "the trained model")
        scores = list(zip(pieces.names, pieces.scores, strict=True))[ENDS:]
        return {name: score for name, score in scores if name not in MARKS}

    def bpe(self, texts: Iterable[str], size: int) -> tuple[list[str], Merges]:
        """BpeTrainer."""
        backend = Backend(models.BPE())
        backend.normalizer, backend.pre_tokenizer = backends.blanks(), backends.splitter("blanks")
        merges = _merges(backend, texts, trainers.BpeTrainer(vocab_size=size, min_frequency=RARE, show_progress=False))
        joined = {left + right for left, right in merges}
        alphabet = [piece for piece in _by_id(backend.get_vocab()) if piece not in joined]
        _check_size(len(alphabet), size)
        return alphabet, _textual(merges)

    def byte_bpe(self, texts: Iterable[str], size: int, pattern: str) -> Merges:
        """BpeTrainer on bytes."""
        backend = Backend(models.BPE())
        backend.pre_tokenizer = backends.byte_words(pattern)
        trainer = trainers.BpeTrainer(
            vocab_size=256 + size, min_frequency=RARE, initial_alphabet=BYTE_TO_CHAR, show_progress=False
        )
        return _merges(backend, texts, trainer)


@dataclass(frozen=True)
class Readable:
    """The reference algorithms of `tokenizer/reference`."""

    ties: bpe.Ties = "library"
    score: wordpiece.Score = "count"
    rest: int = backends.RESERVED  # reserved tokens, for messages

    def words(self, texts: Iterable[str], size: int | None) -> list[str]:
        """By frequency, ties by code points."""
        counts = count_words(texts, "words")
        return sorted(counts, key=lambda word: (-counts[word], word))[:size]

    def wordpiece(self, texts: Iterable[str], size: int) -> list[str]:
        """By frequency or by mutual information."""
        words = count_words(texts, "bert")
        made = wordpiece.train(words, size, self.score, SPECIAL, RARE, {char for word in words for char in word})
        _check_size(len(made), size, 0)
        return made

    def unigram(self, texts: Iterable[str], size: int) -> dict[str, float]:
        """Expectation maximization and pruning."""
        words = count_words(map(backends.with_blanks, texts), "blanks")
        if not words:
            raise InputError("there is no text to train a tokenizer on")
        _check_size(len({char for word in words for char in word}), size, self.rest)
        model = unigram.train(words, size)
        scores = {piece: score for piece, score in model.scores.items() if piece not in MARKS}
        return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))

    def bpe(self, texts: Iterable[str], size: int) -> tuple[list[str], Merges]:
        """Merges of characters."""
        words = count_words(map(backends.with_blanks, texts), "blanks")
        alphabet = sorted({char for word in words for char in word})
        _check_size(len(alphabet), size, self.rest)
        return alphabet, _textual(bpe.train(words, size - len(alphabet), self.ties, min_count=RARE))

    def byte_bpe(self, texts: Iterable[str], size: int, pattern: str) -> Merges:
        """Merges of bytes."""
        return ByteBPE.train(texts, 256 + size, pattern, self.ties, RARE).merges


def _merges(backend: Backend, texts: Iterable[str], trainer: Any) -> Merges:
    backend.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def _textual(merges: Merges) -> Merges:
    """Without merges that spell a special token: plain text must not become one."""
    return [(left, right) for left, right in merges if MARKS.isdisjoint((left, right, left + right))]


def _by_id(vocab: dict[str, int]) -> list[str]:
    return sorted(vocab, key=lambda piece: vocab[piece])


def _check_size(pieces: int, size: int, rest: int = backends.RESERVED) -> None:
    """Refuse an alphabet larger than the vocabulary without its `rest` reserved tokens."""
    if pieces > size:
        what, expected = "the characters of the text alone do not fit into the vocabulary", f"at least {pieces + rest}"
        raise InputError(what, where="vocab_size", found=size + rest, expected=expected)
