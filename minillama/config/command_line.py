"""Command-line overrides: `--section.field VALUE` arguments of `train` as the tables of a TOML file.

The strict loader of `config/loader.py` then reads both, so that an error in either is reported alike.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Union

from minillama.config.loader import Located, nearest, say_renamed, tagged
from minillama.errors import InputError

# names of settings in other trainers
ELSEWHERE = {
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
    "max_iters": "train.steps",
    "block_size": "train.context",
    "seq_len": "train.context",
    "max_seq_length": "train.context",
    "output_dir": "out",
    "out_dir": "out",
}


@dataclass(frozen=True)
class CommandLine(Located):
    """Origin of a value on the command line, for messages."""

    def at(self, key: str) -> str:
        """`command line, --key`."""
        return f"command line, --{key}"


def take_flag(words: list[str], name: str) -> bool:
    """Remove every `--name` from the arguments; whether there was one."""
    found = f"--{name}" in words
    words[:] = [word for word in words if word != f"--{name}"]
    return found


def take_option(words: list[str], name: str) -> str | None:
    """Remove `--name VALUE` or `--name=VALUE` from the arguments; the last value, or None.

    Raises:
        InputError: the value is missing.
    """
    value = None
    i = 0
    while i < len(words):
        flag, equals, inline = words[i].partition("=")
        if flag != f"--{name}":
            i += 1
        elif equals:
            value = inline
            del words[i]
        elif i + 1 == len(words) or words[i + 1].startswith("--"):
            raise InputError(f"--{name} needs a value", where="command line")
        else:
            value = words[i + 1]
            del words[i : i + 2]
    return value


def refuse_repeated(words: Sequence[str]) -> None:
    """Refuse a repeated option, of which only the last values would count.

    Raises:
        InputError: there is one.
    """
    names = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    for name in names:
        if names.count(name) > 1:
            raise _repeated(name, "give it once; where it takes several values, they follow it")


def _repeated(name: str, fix: str) -> InputError:
    return InputError(f"{name} is given more than once", where="command line", fix=fix)


def overrides(
    words: Sequence[str], cls: type, parsers: Mapping[type, Callable[[str], Any]] | None = None
) -> dict[str, Any]:
    """Nested tables from `--section.field VALUE ...` arguments.

    Args:
        words: the command line of `train`; `--a.b VALUE` and `--a.b=VALUE` alike, several values for a list.
        cls: the dataclass that the tables are for; it has the type of each value.
        parsers: from one argument to an element of a list of dataclasses.

    Raises:
        InputError: an unknown name (with the nearest), a missing or invalid value, a stray argument, a repeated
            list. Of other values the last one counts.
    """
    kinds, renamed = dict(_leaves(cls)), dict(_renamed(cls))
    table: dict[str, Any] = {}
    for key, values in _options(words):
        if key in renamed:
            say_renamed(f"--{key}", f"--{renamed[key]}")
            key = renamed[key]
        if key not in kinds:
            raise _unknown(key, kinds)
        *sections, name = key.split(".")
        section = table
        for part in sections:
            section = section.setdefault(part, {})
        if name in section and typing.get_origin(kinds[key]) is tuple:
            raise _repeated(f"--{key}", "all its values follow it once")
        section[name] = _parse(kinds[key], values, key, parsers or {})
    return table


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    i = 0
    while i < len(words):
        word = words[i]
        if not word.startswith("--"):
            raise InputError(
                "an argument that belongs to no option",
                where="command line",
                found=word,
                fix="CONFIG comes first; options are written --section.field VALUE",
            )
        key, equals, inline = word[2:].partition("=")
        i += 1
        values = [inline] if equals else []
        while not equals and i < len(words) and not words[i].startswith("--"):
            values.append(words[i])
            i += 1
        yield key.replace("-", "_"), values


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every field that is not a section."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        kind = _without_none(hints[f.name])
        if members := tagged(hints[f.name]):
            for member in members.values():
                yield from _leaves(member, f"{prefix}{f.name}.")
            yield f"{prefix}{f.name}.name", str  # which says to which of them the others belong
        elif is_dataclass(kind):
            yield from _leaves(typing.cast(type, kind), f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", kind


def _renamed(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Old and new dotted name of every renamed field."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        kind = _without_none(hints[f.name])
        for part in tagged(hints[f.name]).values() or ((kind,) if is_dataclass(kind) else ()):
            yield from _renamed(typing.cast(type, part), f"{prefix}{f.name}.")
        if "was" in f.metadata:
            yield f"{prefix}{f.metadata['was']}", f"{prefix}{f.name}"


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (Union, types.UnionType):
        return next(a for a in typing.get_args(kind) if a is not type(None))
    return kind


def _unknown(key: str, kinds: Mapping[str, Any]) -> InputError:
    last, by_last = key.rpartition(".")[2], {name.rpartition(".")[2]: name for name in kinds}
    close = by_last.get(key) or ELSEWHERE.get(last) or nearest(key, kinds) or by_last.get(nearest(last, by_last) or "")
    if last == "config":
        fix = "the configuration's name or file comes first, without an option: train.py CONFIG"
    else:
        fix = f"did you mean --{close}?" if close else "--help lists them all"
    return InputError(f"unknown option --{key}", where="command line", fix=fix)


def _parse(kind: Any, values: list[str], key: str, parsers: Mapping[type, Callable[[str], Any]]) -> Any:
    """Arguments after an option as a value of its type."""
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        if is_dataclass(element) and element not in parsers:
            raise InputError(f"--{key} cannot be given on the command line", fix="write it in a TOML file")
        return [_word(element, value, key, parsers) for value in values]
    if len(values) != 1:
        found = " ".join(values) or "nothing"
        raise InputError(f"--{key} takes one value", where="command line", found=found)
    return _word(kind, values[0], key, parsers)


def _word(kind: Any, word: str, key: str, parsers: Mapping[type, Callable[[str], Any]]) -> Any:
    if kind in parsers:
        return parsers[kind](word)
    if typing.get_origin(kind) is Literal:
        choices = {str(choice).lower(): choice for choice in typing.get_args(kind)}
        return choices.get(word.lower(), word)  # the strict loader says what was expected
    if kind is bool:
        if word.lower() not in ("true", "false"):
            raise InputError(f"--{key} takes true or false", where="command line", found=word)
        return word.lower() == "true"
    if kind in (int, float):
        try:
            return kind(word.replace("_", ""))
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise InputError(f"--{key} takes {expected}", where="command line", found=word) from None
    return word
