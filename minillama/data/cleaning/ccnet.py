"""CCNet's normalizations of text: for duplicates and for its language models (arXiv 1911.00359)."""

from __future__ import annotations

import re
import unicodedata

# ASCII for each sign; CCNet has the full-width 1 among the quotation marks, and hashes are to be the same
_ASCII = dict.fromkeys("„”“«»１」「《》", '"') | dict.fromkeys("´’", "'") | dict.fromkeys("∶：", ":")
_ASCII |= dict.fromkeys("，、", ",") | dict.fromkeys("–━►", "-")
_ASCII |= dict(zip("。？！（）；～〈〉【】％", ".?!();~<>[]%", strict=True)) | {"—": " - ", "．": ". ", "…": "..."}
_REPLACE = str.maketrans(_ASCII)
_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)])
_DELETE = {**_CONTROLS, **dict.fromkeys(map(ord, _ASCII))}
_DIGIT = re.compile(r"\d")


def replace_punctuation(text: str) -> str:
    """Unicode punctuation as ASCII."""
    return text.translate(_REPLACE)


def normalized_for_duplicates(line: str) -> str:
    """A paragraph without case, numbers and Unicode punctuation."""
    return _DIGIT.sub("0", line.strip().lower()).translate(_DELETE).strip()


def normalized_for_perplexity(line: str) -> str:
    """A line as CCNet's language models read it: without case, accents and numbers, punctuation as ASCII."""
    line = line.strip().lower()
    if not line.isascii():
        line = "".join(char for char in unicodedata.normalize("NFD", line) if unicodedata.category(char) != "Mn")
    return replace_punctuation(_DIGIT.sub("0", line)).translate(_CONTROLS)
