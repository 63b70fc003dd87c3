"""Cloze question: pattern and verbalizers."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minillama.errors import InputError

MASK = "[MASK]"


@dataclass(frozen=True)
class Question:
    """Cloze question."""

    pattern: str = ""
    """Cloze pattern: {field} for a record's fields, one [MASK] for the answer, as "{text} It was [MASK]."."""
    verbalizers: tuple[str, ...] = field(default=(), metadata={"was": "verbalisers"})
    """LABEL=WORDS for each label, as positive=good negative=bad; the words replace [MASK]."""
    label: str = "label"
    """Field of the label; one that is not a string is written as in JSON: true=Yes."""

    def __post_init__(self) -> None:
        if not self.pattern and not self.verbalizers:
            return
        pairs = [entry.partition("=") for entry in self.verbalizers]
        for entry, (label, _, words) in zip(self.verbalizers, pairs, strict=True):
            if not (label and words.strip()):
                what, expected = "a verbalizer without a label or without words", "LABEL=WORDS"
                raise InputError(what, where="verbalizers", found=entry, expected=expected)
        if len(pairs) < 2:
            found, expected = ", ".join(self.verbalizers) or "none", "LABEL=WORDS twice or more"
            raise InputError("a question needs two answers", where="verbalizers", found=found, expected=expected)
        for name, values in (("label", [pair[0] for pair in pairs]), ("words", [pair[2].strip() for pair in pairs])):
            if len(set(values)) < len(values):
                found = ", ".join(self.verbalizers)
                raise InputError(f"two verbalizers have the same {name}", where="verbalizers", found=found)
        if self.pattern.count(MASK) != 1 or "[sMASK]" in self.pattern or "[gMASK]" in self.pattern:
            found, expected = self.pattern or "none", f'{MASK} once and no other mask, as in "{{text}} It was {MASK}."'
            raise InputError("the pattern needs exactly one [MASK]", where="pattern", found=found, expected=expected)
        self._check_fields()

    def _check_fields(self) -> None:
        expected = "{NAME} for one field of the records or more, and {{ for a brace"
        try:
            parts = [part for half in self.pattern.split(MASK) for part in string.Formatter().parse(half)]
        except ValueError as error:
            raise InputError("the pattern's braces do not match", where="pattern", found=error) from None
        names = [name for _, name, _, _ in parts if name is not None]
        odd = [name for _, name, spec, conversion in parts if name is not None and (spec or conversion)]
        odd += [name for name in names if not name or any(char in name for char in ".[]{}!:")]
        if odd or not names:
            found = self.pattern
            raise InputError("the pattern names no plain field", where="pattern", found=found, expected=expected)

    @property
    def fields(self) -> list[str]:
        """Record fields in the pattern."""
        return [name for _, name, _, _ in string.Formatter().parse(self.pattern) if name is not None]

    @property
    def labels(self) -> list[str]:
        """Labels, in order."""
        return [entry.partition("=")[0] for entry in self.verbalizers]

    @property
    def words(self) -> list[str]:
        """Verbalizer of each label."""
        return [entry.partition("=")[2].strip() for entry in self.verbalizers]

    def around(self, fields: Mapping[str, str]) -> tuple[str, str]:
        """Text of the record before and after the mask. A mask in a field is plain text."""
        before, after = (
            "".join(text + (fields[name] if name is not None else "") for text, name, _, _ in parts)
            for parts in map(string.Formatter().parse, self.pattern.split(MASK))
        )
        return before, after


def label_of(value: Any) -> str:
    """Label of a record, as the verbalizers name it."""
    return value if isinstance(value, str) else json.dumps(value)
