"""Special tokens beside plain text that may hold their names: encoding with character offsets.

A library's parser takes `<|im_end|>` for the token wherever it stands, in a user's message too. Here the caller says
where it is one: a stand-in, one character of private use, takes the place of each special token in the coded text, and
names that are left in it are plain characters.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.tokenizer.sentencepiece import with_offsets

_FIRST = 0x100000  # plane 16 is for private use, and has no characters that people share
_STAND_IN = re.compile("[\U00100000-\U0010ffff]")


@dataclass(frozen=True)
class Encoded:
    """Token ids, and the characters of the text that each covers.

    A token of which the text has no character, such as a dummy prefix, has an empty range.
    """

    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)

    def __add__(self, other: Encoded) -> Encoded:
        return Encoded(self.ids + other.ids, self.offsets + other.offsets)

    def moved(self, by: int) -> Encoded:
        """The same tokens elsewhere in a text."""
        return Encoded(self.ids, [(start + by, end + by) for start, end in self.offsets])

    def part(self, first: int, last: int | None = None) -> Encoded:
        """Some of the tokens."""
        return Encoded(self.ids[first:last], self.offsets[first:last])


class SpecialEncoder:
    """Encoder of coded text.

    Args:
        backend: of the tokenizer; it is copied.
        special: id of each special token by name.
        encoder: SentencePieceProcessor, as in `Tokenizer`.
    """

    def __init__(self, backend: Backend, special: Mapping[str, int], encoder: Any = None) -> None:
        self._names = sorted(special)
        self._ids = [special[name] for name in self._names]
        self._characters = {name: chr(_FIRST + k) for k, name in enumerate(self._names)}
        self._encoder = encoder
        flags = backend.get_added_tokens_decoder()
        self._backend = Backend.from_str(backend.to_str())
        self._backend.encode_special_tokens = True  # the names are characters; the stand-ins are the tokens
        added = []
        for name, character in self._characters.items():
            known = flags.get(special[name])
            strips = {"lstrip": known.lstrip, "rstrip": known.rstrip} if known else {}
            added.append(AddedToken(character, normalized=False, special=False, **strips))
        self._backend.add_tokens(added)
        self._stand_ins = {self._backend.token_to_id(character) for character in self._characters.values()}
        words = {name for name in self._names if (known := flags.get(special[name])) and known.single_word}
        longest = sorted(self._names, key=len, reverse=True)
        patterns = (rf"(?<!\w){re.escape(n)}(?!\w)" if n in words else re.escape(n) for n in longest)
        self.names = re.compile("|".join(patterns) or r"(?!)")
        """Matches the name of any special token."""

    def stand_in(self, name: str) -> str:
        """The character that stands for a special token."""
        return self._characters[name]

    def code(self, text: str) -> str:
        """Coded text in which every name of a special token is that token."""
        refuse_stand_ins(text)
        return self.names.sub(lambda match: self._characters[match[0]], text)

    def decode(self, coded: str, offsets: Sequence[tuple[int, int]] = ()) -> tuple[str, list[tuple[int, int]]]:
        """The text of coded text, and ranges of characters in the one as ranges in the other."""
        text = _STAND_IN.sub(lambda match: self._names[ord(match[0]) - _FIRST], coded)
        places = [match.start() for match in _STAND_IN.finditer(coded)]
        grown = [0, *accumulate(len(self._names[ord(coded[place]) - _FIRST]) - 1 for place in places)]

        def moved(place: int) -> int:
            return place + grown[bisect_left(places, place)]

        return text, [(moved(start), moved(end)) for start, end in offsets]

    def __call__(self, coded: str, inside: bool = False) -> Encoded:
        """Token ids with offsets in the coded text.

        Args:
            coded: text with stand-ins.
            inside: the text continues another, and gets no dummy prefix.
        """
        if not inside:
            return self._encode(coded)
        for before in ("\n", "|", "~"):
            start, whole = self._encode(before), self._encode(before + coded)
            count = len(start.ids)
            if whole.ids[:count] == start.ids and whole.offsets[count - 1][1] <= 1:  # no token crosses the boundary
                return whole.part(count).moved(-1)
        return self._encode(coded)

    def in_parts(self, coded: str, cuts: Sequence[int], inside: bool = False) -> Encoded:
        """Token ids such that no token crosses a cut.

        Before each cut stand the tokens that the text up to it has alone, as at inference the prompt has.

        Args:
            coded: text with stand-ins.
            cuts: increasing places in it.
            inside: as for a call.
        """
        whole = self(coded, inside)
        for number, cut in enumerate(cuts):
            # what precedes a special token is segmented without what follows it
            before = max((match.start() for match in _STAND_IN.finditer(coded, 0, cut)), default=0)
            head = self(coded[before:cut], inside and before == 0).moved(before)
            first = next(i for i, (_, end) in enumerate(whole.offsets) if end > before or not before)
            last = next((i for i, (start, _) in enumerate(whole.offsets) if start >= cut), len(whole.ids))
            if whole.ids[first:last] == head.ids and all(end <= cut for _, end in whole.offsets[first:last]):
                continue
            rest = self.in_parts(coded[cut:], [place - cut for place in cuts[number + 1 :]], inside=True)
            return whole.part(0, first) + head + rest.moved(cut)
        return whole

    def _encode(self, coded: str) -> Encoded:
        if self._encoder is not None:
            return self._with_library(coded)
        item = self._backend.encode(coded, add_special_tokens=False)
        ids, offsets = item.ids, item.offsets
        if not self._stand_ins.isdisjoint(ids):
            pairs = zip(ids, offsets, strict=True)
            ids = [self._special(coded, *span, i) if i in self._stand_ins else i for i, span in pairs]
        return Encoded(ids, offsets)

    def _special(self, coded: str, start: int, end: int, other: int) -> int:
        """Id of the special token whose stand-in a token covers, with the spaces that it strips."""
        match = _STAND_IN.search(coded, start, end)
        return other if match is None else self._ids[ord(match[0]) - _FIRST]

    def _with_library(self, coded: str) -> Encoded:
        found, at = Encoded(), 0
        for part in re.split(f"({_STAND_IN.pattern})", coded):
            if _STAND_IN.fullmatch(part):
                found += Encoded([self._ids[ord(part) - _FIRST]], [(at, at + 1)])
            elif part:
                found += Encoded(*with_offsets(self._encoder, part)).moved(at)
            at += len(part)
        return found


def is_stand_in(character: str) -> bool:
    """Whether a character stands for a special token."""
    return character >= "\U00100000"


def refuse_stand_ins(text: str) -> None:
    """Refuse the characters that stand for special tokens.

    Raises:
        InputError: the text holds one.
    """
    if match := _STAND_IN.search(text):
        found = f"U+{ord(match[0]):X}"
        raise InputError("characters of private use from U+100000 on stand for special tokens here", found=found)
