"""Checkable tasks: questions by number, each with the one right answer, for training without any file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillama.data.permutation import derive_keys, permute
from minillama.data.reading import Record
from minillama.errors import InputError

MOST = 10_000  # records of a source

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Task:
    """Task of one size: arithmetic, sorting or spelling.

    Args:
        name: `arithmetic` (27+58= is 85), `sorting` (53142> is 12345) or `spelling` (kobalu: is k o b a l u).
        size: digits of each number, digits to sort, syllables of the word.
    """

    name: str
    size: int

    @classmethod
    def of(cls, word: str) -> Task | None:
        """Task of a source's name, `sorting` or `sorting:7`; None where it names none.

        Raises:
            InputError: a size that is none.
        """
        name, colon, size = word.partition(":")
        if name not in _KINDS:
            return None
        if colon and not (size.isdigit() and 0 < int(size) <= 9):
            raise InputError(f"size of the task {name}", where="data.sources", found=size, expected="1 to 9")
        return cls(name, int(size) if colon else _KINDS[name].size)

    @property
    def count(self) -> int:
        """Number of different questions."""
        return _KINDS[self.name].count(self.size)

    def questions(self, seed: int, indices: Sequence[int] | range) -> Iterator[tuple[str, str]]:
        """Question and answer of each index: a pure function of (seed, index), below `count` without repetition."""
        keys, asked = derive_keys(self.name, self.size, seed), np.asarray(indices, np.uint64) % np.uint64(self.count)
        for number in permute(asked, self.count, keys):
            yield _KINDS[self.name].make(int(number), self.size)

    def records(self, seed: int = 0) -> Iterator[Record]:
        """Different questions as records of `prompt`, `response` and, for preferences, `rejected`, all or `MOST`."""
        for index, (prompt, answer) in enumerate(self.questions(seed, range(min(self.count, MOST)))):
            value: dict[str, Any] = {"prompt": prompt, "response": answer, "task": self.name}
            value["rejected"] = near_miss(answer, index)
            yield Record(value, f"{self.name}:{self.size}, question {index}")


@dataclass(frozen=True)
class _Kind:
    """Default size, number of questions of a size, and question and answer of a number below it."""

    size: int
    count: Callable[[int], int]
    make: Callable[[int, int], tuple[str, str]]


def _addition(number: int, digits: int) -> tuple[str, str]:
    least = 0 if digits == 1 else 10 ** (digits - 1)
    a, b = (least + part for part in divmod(number, 10**digits - least))
    return f"{a}+{b}=", str(a + b)


def _sorting(number: int, digits: int) -> tuple[str, str]:
    text = f"{number:0{digits}}"
    return f"{text}>", "".join(sorted(text))


def _spelling(number: int, syllables: int) -> tuple[str, str]:
    word = ""
    for _ in range(syllables):
        number, consonant = divmod(number, len(CONSONANTS))
        number, vowel = divmod(number, len(VOWELS))
        word += CONSONANTS[consonant] + VOWELS[vowel]
    return f"{word}:", " ".join(word)


_KINDS = {
    "arithmetic": _Kind(2, lambda n: (10**n - (0 if n == 1 else 10 ** (n - 1))) ** 2, _addition),
    "sorting": _Kind(5, lambda n: 10**n, _sorting),
    "spelling": _Kind(3, lambda n: (len(CONSONANTS) * len(VOWELS)) ** n, _spelling),
}
TASKS = tuple(_KINDS)


def near_miss(answer: str, index: int) -> str:
    """A wrong answer: one digit or letter is another one, which and by what follows from the index."""
    places = [i for i, character in enumerate(answer) if character != " "]
    at = places[index % len(places)]
    alphabet = next(letters for letters in ("0123456789", CONSONANTS, VOWELS) if answer[at] in letters)
    shift = 1 + index // len(places) % (len(alphabet) - 1)
    return answer[:at] + alphabet[(alphabet.index(answer[at]) + shift) % len(alphabet)] + answer[at + 1 :]


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, but for spaces around it."""
    return answer.strip() == expected.strip()
