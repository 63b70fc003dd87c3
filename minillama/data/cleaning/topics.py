"""Sensitive topics by a list of words; a trained classifier does it, too (`classifier`, with max_score)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from minillama.data.cleaning.document import Draft, Figures, Step
from minillama.data.cleaning.words import UNSPACED
from minillama.files import read_text


@dataclass(frozen=True)
class SensitiveWords(Step):
    """Words of a list, one per line: whole words, case ignored; Chinese and Japanese ones anywhere."""

    made_by = "write the words into a text file, one per line"

    name: Literal["sensitive-words"] = "sensitive-words"
    path: str = ""
    """The list; lines that begin with # are comments."""
    max_words: int = 0
    """Occurrences."""
    max_share: float = 1.0
    """Share of the text's characters."""

    def measure(self, draft: Draft) -> Figures:
        found = _pattern(self.path).findall(draft.text.lower())
        return {"words": len(found), "share": sum(map(len, found)) / max(len(draft.text), 1)}


@cache
def _pattern(path: str) -> re.Pattern[str]:
    lines = read_text(Path(path)).lower().splitlines()
    listed = {re.escape(line.strip()) for line in lines if line.strip() and not line.startswith("#")}
    longest, unspaced = sorted(listed, key=lambda word: (-len(word), word)), re.compile(f"[{UNSPACED}]")
    parts = [word if unspaced.search(word) else rf"(?<!\w){word}(?!\w)" for word in longest]
    return re.compile("|".join(parts) or r"(?!)")
