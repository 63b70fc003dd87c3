"""New vocabularies: byte-level BPE, bytes, characters. The same texts give the same file, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from minillama.errors import InputError
from minillama.tokenizer.bytelevel import BYTE_TO_CHAR
from minillama.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

__all__ = ["Kind", "TokenizerTrainer", "byte_tokenizer", "char_tokenizer", "train_bpe"]

Kind = Literal["bpe", "bytes", "chars"]
UNKNOWN = "<unk>"


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: merge the commonest pair of adjacent tokens until the vocabulary is full.

    The text is first cut as SmolLM cuts it, every digit alone and then GPT-2's words, because llama.cpp
    knows these rules by a name (`smollm`). Id 0 is `<|endoftext|>`, 1-256 are the bytes, then the merges
    in order. A pair seen once is not merged, so a short text gives fewer tokens than asked for.

    Args:
        texts: documents; no merge crosses from one to the next.
        vocab_size: tokens in all, at least 257.

    Raises:
        InputError: `vocab_size` is below 257.
    """
    if vocab_size < 257:
        what = "this vocabulary cannot hold the 256 bytes and <|endoftext|>"
        raise InputError(what, where="vocab_size", found=vocab_size, expected="at least 257")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=BYTE_TO_CHAR,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes, each its own id, and `<|endoftext|>` as 256."""
    vocab = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)} | {END_OF_TEXT: 256}
    backend = _byte_level(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """`<|endoftext|>` 0, `<unk>` 1, then every character of the texts in code point order."""
    chars: set[str] = set()
    for text in texts:
        chars.update(text)
    vocab = {piece: i for i, piece in enumerate([END_OF_TEXT, UNKNOWN, *sorted(chars)])}
    # BPE without merges is three times as fast here as WordLevel behind a Split, and lines keep its words short.
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "merged_with_previous")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return Tokenizer(backend, config={"unk_token": UNKNOWN})


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    return backend


@dataclass(frozen=True)
class TokenizerTrainer:
    """How to make a tokenizer from texts: `TokenizerTrainer("bpe", 4096)(texts)`.

    Args:
        kind: "bpe", "bytes" or "chars".
        vocab_size: tokens of a BPE vocabulary; the other kinds have as many as they need.

    Raises:
        InputError: an unknown kind.
    """

    kind: Kind = "bpe"
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            expected = ", ".join(get_args(Kind))
            raise InputError("unknown kind of tokenizer", where="kind", found=self.kind, expected=expected)

    @property
    def description(self) -> str:
        """One line that is equal for trainers that make the same file from the same texts."""
        return f"bpe smollm {self.vocab_size}" if self.kind == "bpe" else self.kind

    def __call__(self, texts: Iterable[str]) -> Tokenizer:
        """Train on the texts, which are read once (and not at all for bytes)."""
        if self.kind == "bpe":
            return train_bpe(texts, self.vocab_size)
        return char_tokenizer(texts) if self.kind == "chars" else byte_tokenizer()
