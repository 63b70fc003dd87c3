"""What a cloze question asks: the pattern, and the words that stand for the labels."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from typing import Any

from minillama.errors import InputError

__all__ = ["Question", "label_of"]


@dataclass(frozen=True)
class Question:
    """The question."""

    pattern: str = ""
    """A record as a text: {field} for its fields, one [MASK] for the answer, as "{text} It was [MASK]."."""
    verbalisers: tuple[str, ...] = ()
    """LABEL=WORDS for each label, as positive=good negative=bad; the words fill the blank."""
    label: str = "label"
    """The field that holds the label; one that is no string is written as JSON writes it: true=Yes."""

    def __post_init__(self) -> None:
        if not self.pattern and not self.verbalisers:
            return
        pairs = [entry.partition("=") for entry in self.verbalisers]
        if len(pairs) < 2 or not all(label and words for label, _, words in pairs):
            found = ", ".join(self.verbalisers) or "none"
            raise InputError("a question needs two answers", where="verbalisers", found=found, expected="LABEL=WORDS")
        for name, values in (("label", [pair[0] for pair in pairs]), ("words", [pair[2] for pair in pairs])):
            if len(set(values)) < len(values):
                found = ", ".join(self.verbalisers)
                raise InputError(f"two verbalisers have the same {name}", where="verbalisers", found=found)
        if self.pattern.count("[MASK]") != 1:
            expected = 'one [MASK], as in "{text} It was [MASK]."'
            raise InputError("the pattern has no place for one answer", where="pattern", expected=expected)
        try:
            names = self.fields
        except ValueError as error:
            raise InputError("the pattern's braces do not match", where="pattern", found=error) from None
        if not names or not all(names):
            expected = "{field} for at least one field of the records"
            raise InputError("the pattern names no field", where="pattern", found=self.pattern, expected=expected)

    @property
    def fields(self) -> list[str]:
        """The fields that the pattern shows."""
        return [name for _, name, _, _ in string.Formatter().parse(self.pattern) if name is not None]

    @property
    def labels(self) -> list[str]:
        """The labels, in order."""
        return [entry.partition("=")[0] for entry in self.verbalisers]

    @property
    def words(self) -> list[str]:
        """What fills the blank for each."""
        return [entry.partition("=")[2] for entry in self.verbalisers]


def label_of(value: Any) -> str:
    """A record's label as the verbalisers name it."""
    return value if isinstance(value, str) else json.dumps(value)
