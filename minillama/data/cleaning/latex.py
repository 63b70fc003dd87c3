"""LaTeX articles: body without preamble, bibliography and comments, macros expanded (LLaMA, arXiv 2302.13971, 2.1)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from minillama.data.cleaning.document import Draft, Figures, Step

_START = re.compile(r"\\(?:chapter|part|(?:sub){0,2}section|(?:sub)?paragraph)\b\*?\s*(?:\[[^\]]*\])?\{")
_END = re.compile(r"\\appendix\b|\\begin\{(?:references|thebibliography)\}|\\(?:bibliography|printbibliography)\b")
_COMMENT_LINE, _COMMENT = re.compile(r"^[ \t]*%.*\n?", re.M), re.compile(r"(?<!\\)((?:\\\\)*)%.*$", re.M)
_MACRO = re.compile(
    r"\\(?:(?:re|provide)?newcommand\*?|renewcommand\*?|providecommand\*?)\s*\{?\s*(\\[A-Za-z]+)\s*\}?\s*(\[)?|\\def\s*(\\[A-Za-z]+)\s*(?=([#{]))"
)


@dataclass(frozen=True)
class Latex(Step):
    """Body of an article, from the first section to the bibliography; macros without arguments expanded."""

    name: Literal["latex"] = "latex"
    min_sections: int = 0
    min_characters: int = 1

    def measure(self, draft: Draft) -> Figures:
        text = _COMMENT.sub(r"\1", _COMMENT_LINE.sub("", draft.text))
        macros = definitions(text)
        start = _START.search(text)
        text = text[start.start() :] if start else text
        end = _END.search(text)
        text = text[: end.start()] if end else text
        draft.text, expanded = expand(text, macros)
        sections = len(_START.findall(text))
        return {"sections": sections, "macros": expanded, "characters": len(draft.text.strip())}


def definitions(text: str) -> dict[str, str]:
    """Macros without arguments and their bodies; the last definition counts."""
    found = {}
    for match in _MACRO.finditer(text):
        name, has_arguments = match[1] or match[3], match[2] or match[4] == "#"
        body = None if has_arguments else _braced(text, match.end())
        if body is not None and name not in body:
            found[name] = body
    return found


def _braced(text: str, start: int) -> str | None:
    """Content of the balanced braces that open at `start`."""
    if text[start : start + 1] != "{":
        return None
    depth, at = 0, start
    while at < len(text) and at - start < 10_000:
        depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
        if not depth:
            return text[start + 1 : at]
        at += 1
    return None


def expand(text: str, macros: dict[str, str], rounds: int = 5) -> tuple[str, int]:
    """Text with macros expanded, also within each other, and the number of expansions; it grows ten times at most."""
    total, limit = 0, 10 * len(text) + 1000
    if not macros:
        return text, 0
    pattern = re.compile("(?:" + "|".join(map(re.escape, sorted(macros, key=len, reverse=True))) + r")(?![A-Za-z])")
    for _ in range(rounds):
        text, count = pattern.subn(lambda match: macros[match[0]], text)
        total += count
        if not count or len(text) > limit:
            break
    return text, total
