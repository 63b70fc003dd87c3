"""Wording of the prompts that make data, in English and in Chinese: en.toml and zh.toml, written for this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from minillama.config.loader import read_toml
from minillama.errors import InputError
from minillama.files import digest

Language = Literal["en", "zh"]
_PARTS = ("critique", "revision", "judge")


@cache
def wording(language: Language) -> Mapping[str, Any]:
    """Prompts and templates of a language by name."""
    return read_toml(_file(language))[0]


def wording_digest(language: Language) -> str:
    """SHA-256 of the wording's file, shortened, for provenance: other prompts make other data."""
    return digest(_file(language))[:16]


def _file(language: Language) -> Path:
    return Path(__file__).with_name(f"{language}.toml")


def read_principles(name: str) -> list[Mapping[str, str]]:
    """Principles of constitutional feedback: `en`, `zh`, or a TOML file of [[principles]].

    Each has a `critique` and a `revision`, which ask the model, and a `judge`, by which answers are compared.

    Raises:
        InputError: no such file, or one without them.
    """
    given = wording(name) if name in ("en", "zh") else read_toml(Path(name))[0]
    found = given.get("principles")
    if isinstance(found, Sequence) and found and all(isinstance(p, Mapping) for p in found):
        wrong = [n for n, p in enumerate(found, 1) if not all(isinstance(p.get(part), str) for part in _PARTS)]
        if not wrong:
            return list(found)
        where = f"{name}, principle {wrong[0]}"
    else:
        where = name
    raise InputError("no principles", where=where, expected=f"[[principles]] with {', '.join(_PARTS)}")
