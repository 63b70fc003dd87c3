"""Rules for source code: licenses, license headers, line lengths, alphanumeric share (LLaMA, arXiv 2302.13971, 2.1)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from minillama.data.archives import plain_name
from minillama.data.cleaning.document import Draft, Figures, Removal, Step

_BLOCK = re.compile(r"\A((?:#!.*\n)?\s*+)/\*.*?\*/\s*", re.S)
_LEADING = re.compile(r"\A((?:#!.*\n)?\s*+)((?:[ \t]*(?://|#|--|;|%)(?!include|define|if|pragma|!).*\n)+)")
_KNOWN = """asm bash c cc cpp cs css cu cuh cxx dart el erl ex f90 go h hh hpp hs html java jl js json jsx kt lisp lua m
md ml php pl pm proto ps1 py r rb rs rst scala scm sh sql swift tcl tex ts tsx txt v vim vue xml yaml yml zig"""
EXTENSIONS = tuple(_KNOWN.split())


@dataclass(frozen=True)
class Code(Step):
    """Source files: a copyright header is cut, then lengths and letters decide."""

    name: Literal["code"] = "code"
    licenses: tuple[str, ...] = ("mit", "bsd", "apache")
    """What the field `license` of a record may begin with; records without one pass."""
    extensions: tuple[str, ...] = EXTENSIONS
    max_line_length: int = 1000
    max_mean_line_length: float = 100.0
    min_alphanumeric: float = 0.25
    """Share of letters and digits among the characters."""
    min_characters: int = 1

    def __call__(self, draft: Draft) -> Removal | None:
        license = draft.fields.get("license")
        if isinstance(license, str) and license and not license.lower().startswith(self.licenses):
            return Removal("license", license)
        name = plain_name(str(draft.fields.get("path") or draft.where).partition(":")[0])
        extension = PurePath(name).suffix.lower().lstrip(".")
        if not extension.startswith("jsonl") and (extension not in self.extensions or PurePath(name).stem == "LICENSE"):
            return Removal("extension", extension)
        return super().__call__(draft)

    def measure(self, draft: Draft) -> Figures:
        draft.text = text = without_header(draft.text)
        lengths = list(map(len, text.split("\n")))
        return {
            "line_length": max(lengths),
            "mean_line_length": sum(lengths) / len(lengths),
            "alphanumeric": sum(map(str.isalnum, text)) / max(len(text), 1),
            "characters": len(text.strip()),
        }


def without_header(text: str) -> str:
    """Text without the first comment, if that is about copyright."""
    for pattern in (_BLOCK, _LEADING):
        match = pattern.match(text)
        if match and re.search(r"copyright|license", match[0], re.I):
            return match[1] + text[match.end() :]
    return text
