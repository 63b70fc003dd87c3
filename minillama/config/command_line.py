"""Command-line overrides: `--section.field VALUE` arguments of `train` as the tables of a TOML file.

The strict loader of `config/loader.py` then reads both, so that an error in either is reported alike.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from minillama.config.loader import Located, nearest, say_renamed, tagged, without_none
from minillama.errors import InputError

# our settings -> their names in other trainers
ELSEWHERE = {
    "optim.lr": ("learning_rate",),
    "data.sources": ("data", "dataset", "train_file"),
    "train.steps": ("max_steps", "max_iters"),
    "train.context": ("block_size", "seq_len", "max_seq_length"),
    "out": ("output_dir", "out_dir"),
}


class CommandLine(Located):
    """Origin of a value on the command line, for messages."""

    prefix = "command line, --"


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
    while (at := next((i for i, word in enumerate(words) if word.partition("=")[0] == f"--{name}"), None)) is not None:
        _, equals, value = words.pop(at).partition("=")
        if not equals:
            if at == len(words) or words[at].startswith("--"):
                raise InputError(f"--{name} needs a value", where="command line")
            value = words.pop(at)
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
    settings = list(_settings(cls))
    kinds, renamed = {name: kind for name, kind, _ in settings}, {was: name for name, _, was in settings if was}
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


def _options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    options: list[tuple[str, list[str]]] = []
    takes_more = False
    for word in words:
        if word.startswith("--"):
            key, equals, inline = word[2:].partition("=")
            options.append((key.replace("-", "_"), [inline] if equals else []))
            takes_more = not equals
        elif takes_more:
            options[-1][1].append(word)
        else:
            fix = "CONFIG comes first; options are written --section.field VALUE"
            raise InputError("an argument that belongs to no option", where="command line", found=word, fix=fix)
    return options


def _settings(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted name, type, and former dotted name if any, of every field that is not a section."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        name, kind, members = f"{prefix}{f.name}", without_none(hints[f.name]), tagged(hints[f.name])
        for section in members.values() or ([kind] if is_dataclass(kind) else []):
            yield from _settings(typing.cast(type, section), f"{name}.")
        if members:
            yield f"{name}.name", str, ""  # which says to which of them the others belong
        elif not is_dataclass(kind):
            yield name, kind, f"{prefix}{f.metadata['was']}" if "was" in f.metadata else ""


def _unknown(key: str, kinds: Mapping[str, Any]) -> InputError:
    last, by_last = key.rpartition(".")[2], {name.rpartition(".")[2]: name for name in kinds}
    other = next((name for name, words in ELSEWHERE.items() if last in words), None)
    alike = [name for name in kinds if name.endswith(f".{last}")]
    flags = ("help", "out", "resume", "overwrite")
    close = alike[0] if len(alike) == 1 or (alike and key == last) else other
    close = other if other and key == last else close
    close = close or nearest(key, (*kinds, *flags)) or by_last.get(nearest(last, by_last) or "")
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
        return [_value(element, word, parsers) for word in values]
    if len(values) != 1:
        found = " ".join(values) or "nothing"
        raise InputError(f"--{key} takes one value", where="command line", found=found)
    return _value(kind, values[0], parsers)


def _value(kind: Any, word: str, parsers: Mapping[type, Callable[[str], Any]]) -> Any:
    """A word as a value of that type, or as it is: the strict loader says what was expected."""
    if kind in parsers:
        return parsers[kind](word)
    if kind in (int, float):
        try:
            return kind(word.replace("_", ""))
        except ValueError:
            return word
    choices = (True, False) if kind is bool else typing.get_args(kind)
    return {str(choice).lower(): choice for choice in choices}.get(word.lower(), word)
