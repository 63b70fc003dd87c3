"""Held-out split, and memory-bounded reading of sources."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from minillama.data.examples import is_held_out
from minillama.data.permutation import hash_fraction
from minillama.data.reading import Document
from minillama.data.skipped import Skipped
from minillama.data.sources import OnError, Source, documents
from minillama.errors import InputError

SplitName = Literal["train", "val"]

_LONG = 2**16  # characters
FEW = 10  # held-out documents below which they are few
_CUT = 1000  # characters from which a document of few gives its end


@dataclass(frozen=True)
class Part:
    """A document, or the part of one in a split; whether it has the document's start and end, or begins in a word."""

    split: SplitName
    text: str
    starts: bool = True
    ends: bool = True
    within_word: bool = field(default=False, compare=False)


class SplitSource:
    """Documents of a source with their splits.

    A document is held out when a hash of its text falls below `val_fraction`, so that its split does not depend on
    other documents, and duplicates have the same split. Where the documents are few, under 10 / val_fraction, or
    those held out have more than twice that share of the text, those of 1,000 characters or more are split themselves:
    the last `val_fraction` of each is held out. Where this leaves a
    split empty, the whole text is split at character int(n * (1 - val_fraction)), and the rest is held out. Documents
    are kept in memory up to a limit, beyond which they are read again.

    Args:
        val_fraction: between 0 and 1.
        on_error: as for `documents`.
        memory: bytes of text that may be kept.
    """

    def __init__(self, source: Source, val_fraction: float, on_error: OnError, memory: int) -> None:
        self.source, self.val_fraction, self.on_error, self.memory = source, val_fraction, on_error, memory
        self.skipped = Skipped()
        self.count = 0
        self.chars: dict[SplitName, int] = {"train": 0, "val": 0}
        self.held_out = ""
        self._kept: list[Document] | None = None
        self._is_few = False
        self._boundary: int | None = None

    def scan(self) -> None:
        """Read the source once: count, keep documents up to the limit, and find the split point.

        Raises:
            InputError: the source holds no text, or as `documents`.
        """
        if self.count:
            return
        kept: list[Document] | None = []
        whole, cut = Counter[SplitName](), Counter[SplitName]()  # characters by the two rules
        documents_out, size, long = 0, 0, 0
        for document in documents(self.source, self.on_error, self.skipped):
            self.count += 1
            whole[self._split(document)] += len(document.text)
            documents_out += self._split(document) == "val"
            long += len(document.text) >= _CUT
            for part in self._cut(document):
                cut[part.split] += len(part.text)
            size += sys.getsizeof(document.text)
            if kept is not None:
                kept.append(document)
                kept = kept if size <= self.memory else None
        if not self.count:
            found = str(self.skipped) or "no text"
            fix = "name the field of its records with --data.field" if "field" in found else "leave it out"
            raise InputError("this source holds no text", where=self.source.label, found=found, fix=fix)
        skewed = whole["val"] > 2 * self.val_fraction * whole.total()
        self._kept, self._is_few = kept, skewed or self.count < FEW / self.val_fraction
        share = f"the last {100 * self.val_fraction:.2g}% of"
        counted = f"{documents_out} of {self.count:,} documents"
        parts = f"{share} each document" + (f", those under {_CUT:,} characters whole" if long < self.count else "")
        self.held_out = parts if self._is_few and long else counted
        chars = cut if self._is_few else whole
        if not (chars["train"] and chars["val"]) or self.count == 1:
            total = chars.total()
            self._boundary, self.held_out = int(total * (1 - self.val_fraction)), f"{share} the text"
            chars = Counter({"train": self._boundary, "val": total - self._boundary})
        self.chars = {"train": chars["train"], "val": chars["val"]}

    def parts(self) -> Iterator[Part]:
        """Documents in order, with their splits."""
        self.scan()
        at = 0
        for document in self._kept if self._kept is not None else documents(self.source, self.on_error):
            text = document.text
            if self._boundary is not None:
                yield from _divided(text, self._boundary - at)
                at += len(text)
            elif self._is_few:
                yield from self._cut(document)
            else:
                yield Part(self._split(document), text)

    def sample(self, chars: int) -> Iterator[str]:
        """Subsample of at most `chars` characters of the training documents, in order.

        Short documents are sampled whole, by a hash of their text; of a long one the beginning is taken,
        since by chance none of a few long ones might be.
        """
        self.scan()
        reach = self.chars["train"] if self._kept is not None else min(self.chars["train"], self.memory)
        share = min(1.0, chars / max(reach, 1))
        for part in self.parts():
            long = len(part.text) > _LONG or self.count == 1
            if part.split != "train" or not (long or share == 1 or hash_fraction(part.text, "sample") < share):
                continue
            text = part.text[: min(chars, math.ceil(len(part.text) * share) if long else len(part.text))]
            if not text:
                return
            yield text
            chars -= len(text)

    def _cut(self, document: Document) -> Iterator[Part]:
        """Parts of one of few documents."""
        if len(document.text) < _CUT:
            yield Part(self._split(document), document.text)
        else:
            yield from _divided(document.text, int(len(document.text) * (1 - self.val_fraction)))

    def _split(self, document: Document) -> SplitName:
        return "val" if is_held_out(document.text, self.val_fraction) else "train"


def _divided(text: str, boundary: int) -> Iterator[Part]:
    """Parts before and behind a character."""
    inside = min(max(boundary, 0), len(text))
    if inside:
        yield Part("train", text[:inside], ends=inside == len(text))
    if inside < len(text):
        yield Part("val", text[inside:], starts=not inside, within_word=text[inside - 1 : inside + 1].isalnum())
