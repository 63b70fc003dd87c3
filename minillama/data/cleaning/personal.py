"""Personal data: e-mail and network addresses, phone numbers, Chinese identity and QQ numbers, replaced and counted."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import Literal

from minillama.data.cleaning.document import Draft, Figures, Step

_PATTERNS = {  # in ASCII: between Chinese characters there are no blanks
    "email": r"(?<![\w.+\-])[A-Za-z0-9][\w.+\-]*@(?:[A-Za-z0-9\-]+\.)+[A-Za-z]{2,}(?![\w@])",
    "ip": r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)|(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![\w:])",
    "id": r"(?<!\w)\d{17}[\dXx](?!\w)",
    "qq": r"(?i:(?<![A-Za-z])QQ)(?:号码?|群)?[:：\s]*[1-9]\d{4,10}(?!\d)",
    "phone": r"(?<![\w+.\-])(?:\+\d{1,3}[ .\-]?(?:\(\d{1,4}\)[ .\-]?)?\d{1,4}(?:[ .\-]?\d{2,4}){2,4}"
    r"|(?:\(\d{3}\) ?|\d{3}[.\-])\d{3}[.\-]\d{4}|(?:86[ \-]?)?1[3-9]\d[ \-]?\d{4}[ \-]?\d{4}|0\d{2,3}-\d{7,8})"
    r"(?![\w\-]|\.\d)",
}
_HINTS = {  # without these there is none, and they are found faster
    "email": "@",
    "ip": r"\d\.\d{1,3}\.\d|[0-9A-Fa-f]:[0-9A-Fa-f]{1,4}:",
    "id": r"\d{17}",
    "qq": "[Qq][Qq]",
    "phone": r"\d(?:[ .()\-]{0,2}\d){5}",
}
_KINDS = {name: (re.compile(_HINTS[name]), re.compile(_PATTERNS[name], re.ASCII)) for name in _PATTERNS}
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


@dataclass(frozen=True)
class PersonalData(Step):
    """Personal data replaced by its kind, as <email>: addresses of private networks and of no network stay."""

    name: Literal["personal-data"] = "personal-data"
    kinds: tuple[Literal["email", "ip", "id", "qq", "phone"], ...] = ("email", "ip", "id", "qq", "phone")
    max_replaced: int = 100

    def measure(self, draft: Draft) -> Figures:
        counts = Counter[str]()
        last = max(map([*_KINDS].index, self.kinds), default=-1)
        draft.text = self._replace(draft.text, [*_KINDS][: last + 1], counts)
        return {"replaced": counts.total(), **counts}

    def _replace(self, text: str, kinds: list[str], counts: Counter[str]) -> str:
        """One kind after the other; what is of another kind than those to replace stays as a whole."""
        for i, kind in enumerate(kinds):
            hint, pattern = _KINDS[kind]
            if not hint.search(text):
                continue
            if kind in self.kinds:
                text = pattern.sub(partial(_replaced, kind, counts), text)
                continue
            done, at = [], 0
            for match in (match for match in pattern.finditer(text) if _is_real(kind, match[0])):
                done += [self._replace(text[at : match.start()], kinds[i + 1 :], counts), match[0]]
                at = match.end()
            return "".join([*done, self._replace(text[at:], kinds[i + 1 :], counts)])
        return text


def _replaced(kind: str, counts: Counter[str], match: re.Match[str]) -> str:
    if not _is_real(kind, match[0]):
        return match[0]
    counts[kind] += 1
    return f"<{kind}>"


def _is_real(kind: str, text: str) -> bool:
    if kind == "id":  # GB 11643: ISO 7064 MOD 11-2
        total = sum(int(digit) * weight for digit, weight in zip(text, _WEIGHTS, strict=False))
        return "10X98765432"[total % 11] == text[-1].upper()
    if kind == "ip":
        try:
            return ip_address(text).is_global
        except ValueError:
            return False
    return True
