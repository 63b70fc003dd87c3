"""C4's rules: lines and pages (arXiv 1910.10683, section 2.2), and mC4's."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from minillama.data.cleaning.document import Draft, Figures, Removal, Step
from minillama.data.cleaning.words import sentences

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
ENDS = (".", "?", "!", '"', "'")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclass(frozen=True)
class C4(Step):
    """C4's rules: lines without end mark, of few words, with "javascript" or about cookies go, citations too.

    The page goes with "lorem ipsum", a curly bracket, or few sentences left.
    """

    name: Literal["c4"] = "c4"
    end_punctuation: bool = True
    """Lines must end in . ? ! or a quotation mark; FineWeb leaves this rule out."""
    line_words: int = 3
    word_length: int = 1000
    """Lines need so many words, of at most so many characters."""
    min_sentences: int = 5

    def __call__(self, draft: Draft) -> Removal | None:
        kept, dropped = [], Counter[str]()
        for line in draft.text.splitlines():
            reason, line = self._line(line)
            if reason in ("lorem ipsum", "curly bracket"):
                return Removal(reason)
            if reason:
                dropped[reason] += 1
            else:
                kept.append(line)
        draft.text = "\n".join(kept).strip()
        return self.judge(draft, {"sentences": sum(len(sentences(line)) for line in kept), **dropped})

    def _line(self, line: str) -> tuple[str, str]:
        """Reason against a line, and the line without citations."""
        line = line.strip()
        found = line.split()
        if any(len(word) > self.word_length for word in found):
            return "long word", line
        line = CITATION.sub("", line)
        if self.end_punctuation and (not line.endswith(ENDS) or line.endswith("...")):
            return "no end mark", line
        if len(found) < self.line_words:
            return "few words", line
        lower = line.lower()
        if "lorem ipsum" in lower:
            return "lorem ipsum", line
        if "javascript" in lower:
            return "javascript", line
        if "{" in line:
            return "curly bracket", line
        return ("policy" if any(policy in lower for policy in POLICIES) else ""), line


@dataclass(frozen=True)
class MC4(Step):
    """mC4's rule: three lines of 200 characters (arXiv 2010.11934, section 3.1)."""

    name: Literal["mc4"] = "mc4"
    line_characters: int = 200
    min_long_lines: int = 3

    def measure(self, draft: Draft) -> Figures:
        return {"long_lines": sum(map(self.line_characters.__le__, map(len, draft.text.split("\n"))))}
