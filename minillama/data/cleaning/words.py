"""Words and sentences by pattern, in any script: what the rules count."""

from __future__ import annotations

import re
from functools import lru_cache

# scripts written without spaces between words: each character is a word
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_LETTERS = rf"[^\W{UNSPACED}]"
_WORD = re.compile(rf"{_LETTERS}+(?:['’\-]{_LETTERS}+)*|[{UNSPACED}]|\.{{2,}}|[^\w\s]")
_SENTENCE = re.compile(r"""(?<![.!?…])[.!?…]++["'”’)\]]*+(?=\s|$)|[。！？]++[”’」』）]*+""")


@lru_cache(maxsize=1)  # several rules in a row count the words of one text
def words(text: str) -> tuple[str, ...]:
    """Words and punctuation marks; of Chinese and Japanese, characters."""
    return tuple(_WORD.findall(text))


def sentences(text: str) -> list[str]:
    """Sentences, each up to its end mark; what follows the last mark is one as well."""
    parts, start = [], 0
    for match in _SENTENCE.finditer(text):
        parts.append(text[start : match.end()])
        start = match.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
