"""Vocabulary trainers: the libraries, and the reference algorithms.

Both have the same methods, so that `backends.py` makes the tokenizer in either case. BPE and byte-level BPE give
the same merges in the same order. Sizes exclude special tokens and bytes, except wordpiece's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer as Backend
from tokenizers import models, trainers

from minillama.errors import InputError, optional_import
from minillama.tokenizer import backends, sentencepiece
from minillama.tokenizer.hf_json import END_OF_TEXT
from minillama.tokenizer.pre import BYTE_TO_CHAR, STEPS
from minillama.tokenizer.reference import bpe, unigram, wordpiece
from minillama.tokenizer.reference.byte_bpe import ByteBPE
from minillama.tokenizer.reference.splitting import count_words
from minillama.tokenizer.reference.wordpiece import CONTINUATION
from minillama.tokenizer.sentencepiece_vocab import RESERVED_NAMES, ModelKind, Pieces
from minillama.tokenizer.spec import by_id, to_dict

RULES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")
SENTENCEPIECE_SPECIAL = ("<unk>", "<s>", "</s>")
SENTENCEPIECE_RESERVED = len(SENTENCEPIECE_SPECIAL) + 256
LONGEST_LINE = 2**17  # characters; SentencePiece silently skips lines over a limit
PRIVATE = 0xF0000  # the first of 65,534 private-use characters
RARE = 2  # minimum pair frequency
SPECIAL = (backends.WORDPIECE_UNKNOWN, END_OF_TEXT)
Merges = list[tuple[str, str]]
Model = Literal["unigram", "bpe"]


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
        ends = len(SENTENCEPIECE_SPECIAL)
        data = self.sentencepiece(texts, size + ends, "unigram", "identity", 1.0, backends.RESERVED - ends)
        pieces = sentencepiece.pieces_of(sentencepiece.message(data, "the trained model"), "the trained model")
        scores = list(zip(pieces.names, pieces.scores, strict=True))[ends:]
        return {name: score for name, score in scores if name not in RESERVED_NAMES}

    def sentencepiece(
        self, texts: Iterable[str], size: int, model: Model, normalization: str, coverage: float, rest: int = 0
    ) -> bytes:
        """SentencePiece model, trained line by line. A short text gives fewer token pieces.

        Args:
            size: token pieces, including special tokens and the 256 bytes.
            normalization: of `RULES`; all but identity collapse runs of spaces.
            coverage: character coverage; the rest falls back to bytes.
            rest: tokens that the caller adds to `size`, including the bytes; 0: the bytes are trained in.

        Raises:
            InputError: the package is missing, the text is empty, or its characters need more token pieces.
        """
        library = optional_import("sentencepiece", "this kind of tokenizer", "sentencepiece")
        written = io.BytesIO()
        try:
            library.SentencePieceTrainer.train(
                sentence_iterator=_lines(texts),
                model_writer=written,
                vocab_size=size,
                model_type=model,
                normalization_rule_name=normalization,
                remove_extra_whitespaces=normalization != "identity",
                character_coverage=coverage,
                byte_fallback=not rest,
                hard_vocab_limit=False,
                max_sentence_length=4 * LONGEST_LINE,  # bytes
                minloglevel=3,
            )
        except RuntimeError as error:
            raise _input_error(str(error), size, rest) from None
        return written.getvalue()

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
        words = count_words(map(backends.escape_spaces().normalize_str, texts), "sentencepiece")
        if not words:
            raise InputError("there is no text to train a tokenizer on")
        _check_size(len({char for word in words for char in word}), size, self.rest)
        model = unigram.train(words, size)
        scores = {piece: score for piece, score in model.scores.items() if piece not in RESERVED_NAMES}
        return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))

    def sentencepiece(self, texts: Iterable[str], size: int, model: Model, *_: object) -> bytes:
        """SentencePiece model, without normalization. BPE: scores are minus the rank, the characters come last."""
        learned = size - SENTENCEPIECE_RESERVED
        if model == "unigram":
            scores, kind = self.unigram(texts, learned), ModelKind.UNIGRAM
        else:
            alphabet, merges = self.bpe(texts, learned)
            ranked = dict.fromkeys([*(left + right for left, right in merges), *alphabet])
            scores, kind = {piece: -float(rank) for rank, piece in enumerate(ranked)}, ModelKind.BPE
        return sentencepiece.serialize(Pieces.with_bytes(SENTENCEPIECE_SPECIAL, scores, kind), 1, 2)

    def bpe(self, texts: Iterable[str], size: int) -> tuple[list[str], Merges]:
        """Merges of characters."""
        words = count_words(map(backends.escape_spaces().normalize_str, texts), "sentencepiece")
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
    alphabet = list(alphabet)
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=RARE, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
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


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Nonempty lines, long ones split at spaces."""
    for line in (line for text in texts for line in text.split("\n")):
        start = 0
        while start < len(line):
            stop = start + LONGEST_LINE
            if stop < len(line):
                space = line.rfind(" ", start + 1, stop)
                stop = space if space > start else stop
            if line[start:stop].strip():
                yield line[start:stop]
            start = stop


def _input_error(message: str, vocab_size: int, rest: int) -> InputError:
    if high := re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        what, expected = "the vocabulary is larger than the text allows", f"at most {int(high[1]) + rest}"
    elif small := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        what = "the characters of the text alone do not fit into the vocabulary"
        expected = f"at least {max(int(small[1]), int(small[2])) + rest}"
    elif "sentences_.empty()" in message:
        return InputError("there is no text to train a tokenizer on")
    else:
        return InputError("sentencepiece cannot train on this text", found=message)
    return InputError(what, where="vocab_size", found=vocab_size + rest, expected=expected)
