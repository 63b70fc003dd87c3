"""Byte-level BPE: the symbols are the 256 bytes, so nothing is unknown.

Radford et al. 2019 (GPT-2), §2.2; openai/gpt-2, src/encoder.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from minillama.tokenizer.pre import BYTE_TO_CHAR, piece_bytes
from minillama.tokenizer.reference import bpe
from minillama.tokenizer.reference.splitting import count_words, split


class ByteBPE:
    """Byte-level BPE vocabulary: the 256 bytes in the order of their printable characters, then the merges.

    The merges are in the printable alphabet; the pattern is one of `splitting.LOSSLESS_PATTERNS`.
    """

    def __init__(self, merges: Sequence[bpe.Merge], pattern: str = "gpt-2") -> None:
        self.merges, self.pattern = list(merges), pattern
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.pieces = list(dict.fromkeys([*sorted(BYTE_TO_CHAR), *(left + right for left, right in self.merges)]))
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = "gpt-2",
        ties: bpe.Ties = "library",
        min_count: int = 1,
    ) -> ByteBPE:
        """Byte-level BPE training, `vocab_size` - 256 merges.

        `greatest` compares bytes, not printable characters.
        """
        # the printable characters are in another order than the bytes; code points 0 to 255 are not
        alphabet = [chr(byte) for byte in range(256)] if ties == "greatest" else BYTE_TO_CHAR
        words = {_to_chars(word.encode(), alphabet): count for word, count in count_words(texts, pattern).items()}
        merges = bpe.train(words, vocab_size - 256, ties, alphabet, min_count)
        printable = str.maketrans(dict(zip(alphabet, BYTE_TO_CHAR, strict=True)))
        return cls([(left.translate(printable), right.translate(printable)) for left, right in merges], pattern)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        words = split(text, self.pattern)
        return [self.ids[piece] for word in words for piece in bpe.encode(_to_chars(word.encode()), self.ranks)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; U+FFFD for bytes that are not valid UTF-8."""
        return b"".join(piece_bytes(self.pieces[i]) for i in ids).decode("utf-8", "replace")


def _to_chars(data: bytes, alphabet: Sequence[str] = BYTE_TO_CHAR) -> str:
    return "".join(alphabet[byte] for byte in data)
