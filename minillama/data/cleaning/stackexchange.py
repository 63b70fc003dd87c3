"""StackExchange: question and answers by score, without HTML (LLaMA, arXiv 2302.13971, 2.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import unescape
from typing import Any, Literal

from minillama.data.cleaning.document import Draft, Figures, Step

_ITEM, _BREAK = re.compile(r"<(?:li|ol|ul)\b[^<>]*>", re.I), re.compile(r"<(?:br|/p|/pre|/h\d)\b[^<>]*>", re.I)
_TAG, _BLANK = re.compile(r"</?[A-Za-z!][^<>]*>"), re.compile(r"\n{3,}")


@dataclass(frozen=True)
class StackExchange(Step):
    """Text `Q: question`, then `A: answer` for each of the record's `answers`, by descending score."""

    name: Literal["stack-exchange"] = "stack-exchange"
    lowest_score: int = -1_000_000
    """Answers of lower scores are left out."""
    min_answers: int = 0
    min_characters: int = 1

    def measure(self, draft: Draft) -> Figures:
        answers = [answer for answer in draft.fields.pop("answers", ()) if isinstance(answer, Mapping)]
        kept = sorted((a for a in answers if _score(a) >= self.lowest_score), key=_score, reverse=True)
        title = draft.fields.get("title")
        question = "\n".join(filter(None, (title if isinstance(title, str) else "", draft.text)))
        parts = [f"A: {plain(str(answer.get('text') or answer.get('body') or ''))}" for answer in kept]
        is_composed = draft.text.startswith("Q: ") and not answers
        draft.text = "\n\n".join([plain(question) if is_composed else f"Q: {plain(question)}", *parts])
        return {"answers": len(kept) or draft.text.count("\nA: "), "characters": len(draft.text)}


def _score(answer: Mapping[str, Any]) -> float:
    score = next((answer[key] for key in ("score", "pm_score") if key in answer), 0)
    return score if isinstance(score, int | float) else 0


def plain(html: str) -> str:
    """HTML of a post as text: list items as lines with a star, the other tags removed."""
    text = _TAG.sub("", _BREAK.sub("\n", _ITEM.sub("\n*", html)))
    return _BLANK.sub("\n\n", unescape(text)).strip()
