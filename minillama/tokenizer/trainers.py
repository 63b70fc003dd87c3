"""Vocabulary trainers: the libraries, and the reference algorithms.

Both have the same methods, so that `backends.py` makes the tokenizer in either case. BPE and byte-level BPE give
the same merges in the same order. Sizes exclude special tokens and bytes, except wordpiece's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models, trainers

from minillama.errors import InputError
from minillama.tokenizer import backends, sentencepiece, sentencepiece_training
from minillama.tokenizer.hf_json import END_OF_TEXT
from minillama.tokenizer.pre import BYTE_TO_CHAR, STEPS
from minillama.tokenizer.reference import bpe, unigram, wordpiece
from minillama.tokenizer.reference.byte_bpe import ByteBPE
from minillama.tokenizer.reference.splitting import count_words
from minillama.tokenizer.reference.wordpiece import CONTINUATION
from minillama.tokenizer.sentencepiece_vocab import RESERVED_NAMES
from minillama.tokenizer.spec import by_id, to_dict

PRIVATE = 0xF0000  # the first of 65,534 private-use characters
RARE = 2  # minimum pair frequency
SPECIAL = (backends.WORDPIECE_UNKNOWN, END_OF_TEXT)
Merges = list[tuple[str, str]]


class Library:
    """The trainers of the Rust library, and SentencePiece's."""

    def wordpiece(self, texts: Iterable[str], size: int) -> list[str]:
        """Token pieces, special tokens first: BpeTrainer on words whose later characters are continuation symbols.

        As WordPieceTrainer, which numbers these symbols at random and so breaks ties at random.
        """
        words = count_words(texts, "bert")
        later = sorted({char for word in words for char in word[1:]})
        inner = {ord(char): chr(PRIVATE + i) for i, char in enumerate(later)}
        shown = {PRIVATE + i: char for i, char in enumerate(later)}
        spelled = (w[0] + w[1:].translate(inner) for w, count in words.items() for _ in range(count))
        first = sorted({char for word in words for char in word})
        names, _ = _train_bpe(Backend(models.BPE()), spelled, size - len(SPECIAL), first)
        _check_size(len(names) + len(SPECIAL), size, 0)
        pieces = (CONTINUATION + name if ord(name[0]) in shown else name for name in names)
        return [*SPECIAL, *(piece.translate(shown) for piece in pieces)]

    def unigram(self, texts: Iterable[str], size: int) -> dict[str, float]:
        """Token piece -> ln p, by SentencePiece's trainer; the tokenizers library's is not deterministic."""
        ends = len(sentencepiece_training.SPECIAL)
        rest = backends.RESERVED - ends
        data = sentencepiece_training.train(texts, size + ends, "unigram", "identity", 1.0, rest)
        pieces = sentencepiece.pieces_of(sentencepiece.message(data, "the trained model"), "the trained model")
        scores = list(zip(pieces.names, pieces.scores, strict=True))[ends:]
        return {name: score for name, score in scores if name not in RESERVED_NAMES}

    def bpe(self, texts: Iterable[str], size: int) -> tuple[list[str], Merges]:
        """Alphabet and merges, by BpeTrainer."""
        backend = Backend(models.BPE())
        backend.normalizer, backend.pre_tokenizer = backends.escape_spaces(), backends.splitter("sentencepiece")
        names, merges = _train_bpe(backend, texts, size)
        joined = {left + right for left, right in merges}
        alphabet = [name for name in names if name not in joined]
        _check_size(len(alphabet), size)
        return alphabet, _learnable(merges)

    def byte_bpe(self, texts: Iterable[str], size: int, pattern: str) -> Merges:
        """Merges of bytes as printable characters, by BpeTrainer."""
        backend = Backend(models.BPE())
        backend.pre_tokenizer = STEPS[pattern]
        return _train_bpe(backend, texts, 256 + size, BYTE_TO_CHAR)[1]


@dataclass(frozen=True)
class Reference:
    """The algorithms of `tokenizer/reference`."""

    ties: bpe.Ties = "library"
    score: wordpiece.Score = "count"
    rest: int = backends.RESERVED  # reserved tokens, for messages

    def wordpiece(self, texts: Iterable[str], size: int) -> list[str]:
        """By frequency or by mutual information."""
        words = count_words(texts, "bert")
        made = wordpiece.train(words, size, self.score, SPECIAL, RARE, {char for word in words for char in word})
        _check_size(len(made), size, 0)
        return made

    def unigram(self, texts: Iterable[str], size: int) -> dict[str, float]:
        """Expectation maximization and pruning."""
        words = count_words(map(backends.spaces_escaped, texts), "sentencepiece")
        if not words:
            raise InputError("there is no text to train a tokenizer on")
        _check_size(len({char for word in words for char in word}), size, self.rest)
        model = unigram.train(words, size)
        scores = {piece: score for piece, score in model.scores.items() if piece not in RESERVED_NAMES}
        return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))

    def bpe(self, texts: Iterable[str], size: int) -> tuple[list[str], Merges]:
        """Merges of characters."""
        words = count_words(map(backends.spaces_escaped, texts), "sentencepiece")
        alphabet = sorted({char for word in words for char in word})
        _check_size(len(alphabet), size, self.rest)
        return alphabet, _learnable(bpe.train(words, size - len(alphabet), self.ties, min_count=RARE))

    def byte_bpe(self, texts: Iterable[str], size: int, pattern: str) -> Merges:
        """Merges of bytes."""
        return ByteBPE.train(texts, 256 + size, pattern, self.ties, RARE).merges


def _train_bpe(
    backend: Backend, texts: Iterable[str], size: int, alphabet: Iterable[str] = ()
) -> tuple[list[str], Merges]:
    """BpeTrainer: the vocabulary in the order of its ids, and the merges."""
    options: dict[str, Any] = {"min_frequency": RARE, "initial_alphabet": list(alphabet), "show_progress": False}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    merges = to_dict(backend)["model"]["merges"]
    return list(by_id(backend).values()), [(left, right) for left, right in merges]


def _learnable(merges: Merges) -> Merges:
    """Without merges that spell a special token: plain text must not become one."""
    return [(left, right) for left, right in merges if RESERVED_NAMES.isdisjoint((left, right, left + right))]


def _check_size(pieces: int, size: int, rest: int = backends.RESERVED) -> None:
    """Refuse an alphabet larger than the vocabulary without its `rest` reserved tokens."""
    if pieces > size:
        what, expected = "the characters of the text alone do not fit into the vocabulary", f"at least {pieces + rest}"
        raise InputError(what, where="vocab_size", found=size + rest, expected=expected)
