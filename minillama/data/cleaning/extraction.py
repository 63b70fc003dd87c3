"""Text extraction from HTML: the article without navigation, by trafilatura."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Literal

from minillama.data.cleaning.document import Draft, Removal, Step
from minillama.errors import optional_import

_TAG = re.compile(r"<(/?)([a-zA-Z][\w\-]*)")
_LONG = re.compile(r"<[^<>]{5000,}")
_FLAT = "area base br col dd dt embed hr img input li link meta option p param source td th tr track wbr"
_VOID = frozenset(_FLAT.split())


@dataclass(frozen=True)
class Extract(Step):
    """Article text of HTML pages; texts pass as they are."""

    name: Literal["extract"] = "extract"
    favor: Literal["precision", "balance", "recall"] = "precision"
    max_html_characters: int = 5_000_000
    max_depth: int = 2000
    """Elements within one another: a parser's time may grow with their square."""
    max_tag_words: int = 5000
    """Words in a tag, its attributes: the same."""
    min_characters: int = 1

    def __call__(self, draft: Draft) -> Removal | None:
        if draft.kind != "html":
            return None
        figures = {"html_characters": len(draft.text), "depth": depth(draft.text)}
        figures["tag_words"] = max((len(tag.split()) for tag in _LONG.findall(draft.text)), default=0)
        if large := self.judge(draft, figures):
            return large
        trafilatura = optional_import("trafilatura", "extraction from HTML", "data")
        logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
        precise, complete = self.favor == "precision", self.favor == "recall"
        text = trafilatura.extract(draft.text, include_comments=False, favor_precision=precise, favor_recall=complete)
        draft.text, draft.kind = text or "", ""
        return self.judge(draft, figures | {"characters": len(draft.text)})


def depth(html: str) -> int:
    """Deepest nesting of elements, of those whose end tag is not optional."""
    deepest = now = 0
    for match in _TAG.finditer(html):
        if match[2].lower() not in _VOID:
            now = max(now - 1, 0) if match[1] else now + 1
            deepest = max(deepest, now)
    return deepest
