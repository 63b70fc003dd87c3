"""Variable-length byte n-grams: shortest segmentation over a vocabulary of frequent n-grams.

Bytes alone make Chinese text three times as long as its characters. Frequent byte n-grams, across character
boundaries too, shorten it without a large vocabulary, and languages share them (Wang, Cho and Gu 2020,
arXiv 1909.03341, §3.1). Here the vocabulary is selected by bytes saved, not by merges; segmentation is the
Viterbi algorithm.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping

from minillama.errors import InputError
from minillama.tokenizer.reference.unigram import Unigram
from minillama.tokenizer.reference.utf8 import recover


class ByteNgrams:
    """Byte n-gram vocabulary: the 256 bytes, ids 0 to 255, then n-grams of two bytes or more, in order."""

    def __init__(self, ngrams: Iterable[bytes]) -> None:
        self.pieces = list(dict.fromkeys([*(bytes([byte]) for byte in range(256)), *ngrams]))
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        # bytes as characters of equal probability: the best segmentation is the shortest
        self._model = Unigram({piece.decode("latin-1"): -1.0 for piece in self.pieces})
        self.longest = self._model.longest

    @classmethod
    def train(cls, words: Mapping[str, int], vocab_size: int, longest: int = 12) -> ByteNgrams:
        """Select the `vocab_size` - 256 n-grams that save most bytes.

        Substrings of a frequent n-gram are as frequent, but redundant. So twenty times as many are selected
        by count times length - 1, the words are segmented with them, and the half that saves least is pruned,
        repeatedly.

        Args:
                vocab_size: token pieces in all, at least 256.
            longest: bytes per n-gram at most.

        Raises:
            InputError: `vocab_size` does not hold the bytes.
        """
        if vocab_size < 256:
            what = "this vocabulary cannot hold the 256 bytes"
            raise InputError(what, where="vocab_size", found=vocab_size, expected="at least 256")
        counts = Counter[bytes]()
        for word, count in words.items():
            data = word.encode()
            for start in range(len(data)):
                for end in range(start + 2, min(len(data), start + longest) + 1):
                    counts[data[start:end]] += count
        saved = {ngram: count * (len(ngram) - 1) for ngram, count in counts.items() if count > 1}
        size = 20 * (vocab_size - 256)
        while True:
            chosen = heapq.nlargest(size, saved, key=lambda ngram: (saved[ngram], ngram))
            if size <= vocab_size - 256:
                return cls(chosen)
            model, saved = cls(chosen), dict.fromkeys(chosen, 0)
            for word, count in words.items():
                for piece in (model.pieces[i] for i in model.encode(word)):
                    if len(piece) > 1:
                        saved[piece] += count * (len(piece) - 1)
            size = max(vocab_size - 256, size // 2)

    def encode(self, text: str) -> list[int]:
        """Token ids of the shortest segmentation; ties: the longest last token piece."""
        segments = self._model.encode(text.encode().decode("latin-1"))
        return [self.ids[segment.encode("latin-1")] for segment in segments]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, invalid UTF-8 recovered by `utf8.recover`."""
        return recover(b"".join(self.pieces[i] for i in ids))
