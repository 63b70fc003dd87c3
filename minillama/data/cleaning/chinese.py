"""Rules for Chinese: characters, punctuation, lines, other scripts (as WuDao and MNBVC have them)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from minillama.data.cleaning.document import Draft, Figures, Step
from minillama.data.cleaning.gopher import duplicates

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_FOREIGN = re.compile("[^\\s\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003134f]+")
_MARK = re.compile("[，。、；：？！“”‘’「」『』（）《》〈〉【】…—,.;:?!]")
_BETWEEN = re.compile(f"(?<={_HAN.pattern})[ \u3000]+(?={_HAN.pattern})")


@dataclass(frozen=True)
class Chinese(Step):
    """Chinese prose or verse; blanks between its characters go. Shares are of the characters that are no blanks."""

    name: Literal["chinese"] = "chinese"
    min_han: int = 10
    min_han_share: float = 0.6
    min_marks: float = 0.01
    max_marks: float = 0.35
    max_foreign_run: int = 200
    """Longest run of characters of other scripts."""
    max_duplicate_lines: float = 0.3
    max_duplicate_line_characters: float = 0.2

    def measure(self, draft: Draft) -> Figures:
        text = draft.text = _BETWEEN.sub("", draft.text)
        size, lines = max(len("".join(text.split())), 1), [line.strip() for line in text.split("\n") if line.strip()]
        count, characters = duplicates(lines)
        han = len(_HAN.findall(text))
        return {
            "han": han,
            "han_share": han / size,
            "marks": len(_MARK.findall(text)) / size,
            "foreign_run": max(map(len, _FOREIGN.findall(text)), default=0),
            "duplicate_lines": count / max(len(lines), 1),
            "duplicate_line_characters": characters / size,
        }
