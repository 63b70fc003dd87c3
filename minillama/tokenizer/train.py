"""Tokenizer training, all kinds. The same texts give the same file, byte for byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from minillama.config.arguments import checked
from minillama.config.loader import check
from minillama.errors import InputError
from minillama.tokenizer import backends, sentencepiece
from minillama.tokenizer.hf_json import END_OF_TEXT
from minillama.tokenizer.pre import BYTE_TO_CHAR, STEPS, byte_level_bpe
from minillama.tokenizer.reference.bpe import Ties
from minillama.tokenizer.reference.splitting import by_frequency, count_words
from minillama.tokenizer.reference.wordpiece import Score
from minillama.tokenizer.spec import check_unicode
from minillama.tokenizer.tokenizer import Tokenizer
from minillama.tokenizer.trainers import RULES, SENTENCEPIECE_RESERVED, Library, Model, Reference

Kind = Literal["byte-bpe", "bpe", "unigram", "sentencepiece", "wordpiece", "word", "char", "bytes"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# settings of some kinds only: these kinds, and the choices
_SETTINGS: dict[str, tuple[tuple[Kind, ...], tuple[str, ...]]] = {
    "kind": (KINDS, KINDS),
    "pattern": (("byte-bpe",), tuple(STEPS)),
    "ties": (("byte-bpe", "bpe", "sentencepiece"), get_args(Ties)),
    "score": (("wordpiece",), get_args(Score)),
    "model": (("sentencepiece",), get_args(Model)),
    "normalization": (("sentencepiece",), RULES),
    "coverage": (("sentencepiece",), ()),
}


@dataclass(frozen=True)
class TokenizerTrainer:
    """Tokenizer training settings: `TokenizerTrainer("byte-bpe", 4096)(texts)`.

    Id 0 or 1 is `<|endoftext|>` (SentencePiece has `</s>`, 2), then the alphabet, then the learned tokens.

    Args:
        kind: algorithm.

            - byte-bpe: byte-level BPE, no unknown token; pre-tokenized by `pattern`.
            - bpe: BPE on characters, with byte fallback.
            - unigram: unigram language model, with byte fallback.
            - sentencepiece: a SentencePiece .model, of kind `model`, with byte fallback.
            - wordpiece: BERT's; a word without a segmentation is unknown, whitespace is lost.
            - word: the most frequent words; the others are unknown, whitespace is lost.
            - char: the most frequent characters. bytes: the 256 bytes, without training.
        vocab_size: tokens in all. A short text gives fewer, unless `full` is set. 0: as many as
            there are (word, char); bytes always has 257.
        pattern: of byte-bpe: smollm (single digits; llama.cpp knows these four but cl100k), gpt-2, llama-3, cl100k.
        ties: between equally frequent pairs; all but `library` use the reference code.
        score: of wordpiece: `count`, or mutual `information` (BERT's paper), by the reference code.
        model: of sentencepiece: unigram or bpe.
        normalization: of sentencepiece: one of `RULES`; the reference code has identity alone.
        coverage: of sentencepiece: character coverage; 1 in the reference code.
        reference: train with the reference code of `tokenizer/reference`, not with a library.
        full: fewer tokens than `vocab_size` are an error.
        special: further special tokens, the last of the `vocab_size`, such as GLM's mask tokens.

    Raises:
        InputError: an unknown kind, pattern or rule, a vocabulary too small for its special tokens and bytes; with
            `full`, or of kind sentencepiece, one larger than the text allows.
    """

    kind: Kind = "byte-bpe"
    vocab_size: int = 4096
    pattern: str = "smollm"
    ties: Ties = "library"
    score: Score = "count"
    model: Model = "unigram"
    normalization: str = "nmt_nfkc"
    coverage: float = 0.9995
    reference: bool = False
    full: bool = False
    special: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (kinds, choices) in _SETTINGS.items():
            value = getattr(self, name)
            if choices and value not in choices:
                what, expected = f"unknown {name} of a tokenizer", ", ".join(choices)
                raise InputError(what, where=name, found=value, expected=expected)
            if value != getattr(TokenizerTrainer, name) and self.kind not in kinds:
                found, expected = f"{name} = {value} with {self.kind}", " or ".join(kinds)
                raise InputError("this setting is another kind's", where=name, found=found, expected=expected)
        check(self)
        if not 0.98 <= self.coverage <= 1:
            where = "character_coverage"
            raise InputError("character coverage out of range", where=where, found=self.coverage, expected="0.98 to 1")
        own = {"", END_OF_TEXT, backends.UNKNOWN, backends.WORDPIECE_UNKNOWN, "<s>", "</s>"}
        if len(set(self.special)) < len(self.special) or own & set(self.special):
            raise InputError("special tokens need unique names", where="special", found=", ".join(self.special))
        reserved = {"byte-bpe": 257, "bpe": 259, "unigram": 259, "sentencepiece": 260, "wordpiece": 3, "bytes": 0}
        least = 257 if self.kind == "bytes" and self.full else reserved.get(self.kind, 3 if self.vocab_size else 0)
        least += len(self.special) if least else 0
        if self.vocab_size < least:
            what = "this vocabulary cannot hold its special tokens and, where the kind has them, the 256 bytes"
            raise InputError(what, where="vocab_size", found=self.vocab_size, expected=f"at least {least}")

    @property
    def description(self) -> str:
        """Cache key: equal for trainers that make the same file from the same texts."""
        if self.kind == "bytes":
            return " ".join(("bytes", *self.special))
        return " ".join(f"{key}={value}" for key, value in asdict(self).items())

    @checked
    def __call__(self, texts: Iterable[str]) -> Tokenizer:
        """Train on the texts, in one pass (none for bytes)."""
        plain = replace(self, vocab_size=max(0, self.vocab_size - len(self.special)), special=())
        made = plain._train(map(check_unicode, texts)).with_special(self.special)
        if self.full and made.vocab_size < self.vocab_size:
            what, fix = "the vocabulary is larger than the text allows", "give more text, or ask for fewer tokens"
            expected = f"at most {made.vocab_size}"
            raise InputError(what, where="vocab_size", found=self.vocab_size, expected=expected, fix=fix)
        return made

    def _train(self, texts: Iterable[str]) -> Tokenizer:
        size, unknown = self.vocab_size, {"unk_token": backends.UNKNOWN}
        is_reference = self.reference or self.ties != "library" or (self.kind == "wordpiece" and self.score != "count")
        rest = SENTENCEPIECE_RESERVED if self.kind == "sentencepiece" else backends.RESERVED
        trainer = Reference(self.ties, self.score, rest) if is_reference else Library()
        if self.kind == "sentencepiece":
            data = trainer.sentencepiece(texts, size, self.model, self.normalization, self.coverage)
            return Tokenizer.of(sentencepiece.parse(data, "the trained model"))
        if self.kind == "bytes":
            return byte_tokenizer()
        if self.kind == "char":
            return char_tokenizer(texts, size)
        if self.kind == "word":
            words = by_frequency(count_words(texts, "words"))
            return Tokenizer(backends.word(words[: size - 2 if size else None]), config=unknown)
        if self.kind == "wordpiece":
            backend = backends.wordpiece(trainer.wordpiece(texts, size))
            return Tokenizer(backend, config={"unk_token": backends.WORDPIECE_UNKNOWN})
        if self.kind == "unigram":
            return Tokenizer(backends.unigram(trainer.unigram(texts, size - backends.RESERVED)), config=unknown)
        if self.kind == "bpe":
            return Tokenizer(backends.bpe(*trainer.bpe(texts, size - backends.RESERVED)), config=unknown)
        return Tokenizer(backends.byte_bpe(trainer.byte_bpe(texts, size - 257, self.pattern), self.pattern))


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: `<|endoftext|>` 0, the bytes 1-256, then the merges in order.

    Minimum pair frequency 2, so a short text gives fewer tokens than `vocab_size`.
    """
    return TokenizerTrainer("byte-bpe", vocab_size)(texts)


def byte_tokenizer() -> Tokenizer:
    """Byte tokenizer: the 256 bytes, each its own id, and `<|endoftext|>` as 256."""
    return Tokenizer(byte_level_bpe([*BYTE_TO_CHAR, END_OF_TEXT], [], "smollm", [END_OF_TEXT]))


def char_tokenizer(texts: Iterable[str], vocab_size: int = 0) -> Tokenizer:
    """Character tokenizer: `<|endoftext|>` 0, `<unk>` 1, then the characters of the texts in code point order.

    The most frequent are kept, `vocab_size` tokens in all; 0 keeps every character.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    kept = by_frequency(counts)[: vocab_size - 2 if vocab_size else None]
    return Tokenizer(backends.chars(sorted(kept)), config={"unk_token": backends.UNKNOWN})
