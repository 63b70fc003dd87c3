"""Repair of characters: mojibake (ftfy), traditional to simplified Chinese (OpenCC)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from minillama.data.cleaning.document import Draft, Figures, Step
from minillama.errors import optional_import

_LINE, _PLAIN = re.compile(r"[^\n]*\n|[^\n]+"), re.compile("[\t -~‘’“”–—…]*(?:\r?\n)?")  # nothing in it to repair


@dataclass(frozen=True)
class Repair(Step):
    """Mojibake undone, control characters and terminal escapes deleted; Chinese punctuation and quotes stay."""

    name: Literal["repair"] = "repair"
    max_replacement_characters: float = 0.005
    """Share of U+FFFD, where bytes are lost."""

    def measure(self, draft: Draft) -> Figures:
        fix, config = _fixer()
        lines = _LINE.findall(draft.text)  # ftfy, too, repairs each line with its end for itself
        text = "".join([line if _PLAIN.fullmatch(line) else fix(line, config) for line in lines]).replace("\r\n", "\n")
        repaired, draft.text = float(text != draft.text), text
        return {"repaired": repaired, "replacement_characters": text.count("\ufffd") / max(len(text), 1)}


@cache
def _fixer() -> tuple[Any, Any]:
    """The library's function and its settings."""
    ftfy = optional_import("ftfy", "the repair of characters", "data")
    settings = {"unescape_html": False, "fix_character_width": False, "uncurl_quotes": False, "normalization": None}
    return ftfy.fix_text, ftfy.TextFixerConfig(**settings)


@dataclass(frozen=True)
class SimplifiedChinese(Step):
    """Traditional characters as simplified ones."""

    name: Literal["simplified-chinese"] = "simplified-chinese"
    convert: bool = True
    """False: only measure."""
    max_mixed: float = 1.0
    """Share of the rarer of the two scripts among the characters that tell them apart."""

    def measure(self, draft: Draft) -> Figures:
        simplified = _converter("t2s").convert(draft.text)
        texts = simplified, _converter("s2t").convert(draft.text)
        counts = [sum(map(str.__ne__, draft.text, text)) for text in texts]
        draft.text = simplified if self.convert else draft.text
        return {"traditional": counts[0], "simplified": counts[1], "mixed": min(counts) / max(sum(counts), 1)}


@cache
def _converter(name: str) -> Any:
    return optional_import("opencc", "the conversion of Chinese characters", "data").OpenCC(name)
