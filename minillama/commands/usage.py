"""Errors of command lines that tyro rejects, as the package's own."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

from minillama.config.loader import nearest
from minillama.errors import InputError

NUMBERS = {"INT": "a whole number", "FLOAT": "a number"}


class UsageError(InputError):
    """Command line that cannot be parsed."""


@contextmanager
def own_errors(command: ModuleType) -> Iterator[None]:
    """Raise `UsageError` where tyro would print a box and exit; a tyro without such hooks still does.

    Args:
        command: the module, whose dataclasses have the options.
    """
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        yield
        return

    kinds = [kind for kind in vars(command).values() if is_dataclass(kind)]
    options = {f"--{field.name.replace('_', '-')}" for kind in kinds for field in fields(kind)}

    def handle(event: Any) -> None:
        found = _error(type(event).__name__, event, options)
        if found is not None:
            raise found

    with on_parse_error(handle):
        yield


def _error(kind: str, event: Any, options: set[str]) -> UsageError | None:
    where, fix = "command line", f"{event.prog} --help"
    if kind == "MissingArgs":
        names = ", ".join(_name(missing.arg) for missing in event.missing_arguments)
        unknown = event.unrecognized_tokens
        near = _near(unknown, options) if unknown else None
        if unknown and not any(word.startswith("-") for word in unknown):  # values without their options
            given = zip(names.split(", "), unknown, strict=False)
            near = f"{event.prog} " + " ".join(f"{name} {shlex.quote(word)}" for name, word in given) + " ..."
        return UsageError(f"missing: {names}", where=where, found=" ".join(unknown) or None, fix=near or fix)
    if kind == "UnrecognizedArgs":
        option = next((word for word in event.tokens if word.startswith("-")), None)
        what = f"unknown option {option}" if option else "an argument that belongs to no option"
        found = None if option else " ".join(event.tokens)
        return UsageError(what, where=where, found=found, fix=_near(event.tokens, options) or fix)
    if kind == "InvalidChoice":
        near, what = nearest(event.value, event.choices), f"{_name(event.argument)} has no such value"
        fix = f"did you mean {near!r}?" if near else fix
        return UsageError(what, where=where, found=event.value, expected=", ".join(event.choices), fix=fix)
    if kind == "BadValue":
        return UsageError(f"{_name(event.argument)} needs a value", where=where, found=event.offending_value, fix=fix)
    if kind == "InstantiationFailure" and event.argument is not None:
        expected = NUMBERS.get(event.argument.lowered.metavar)
        found = event.message.rpartition(": ")[2] if expected else event.message
        what = f"{_name(event.argument)} has a value of the wrong type"
        return UsageError(what, where=where, found=found, expected=expected, fix=None if expected else fix)
    if kind == "MissingSubcommand":
        names = ", ".join(event.subcommand_spec.parser_from_name)
        return UsageError("no such subcommand", where=where, found=event.found_token or "none", expected=names)
    return None


def _name(argument: Any) -> str:
    """Option as it is typed, or the metavar of a positional argument."""
    return str(argument.lowered.metavar if argument.is_positional() else argument.lowered.name_or_flags[-1])


def _near(words: Sequence[str], options: set[str]) -> str | None:
    """Suggestion for the first option among words: the nearest name, or one that begins so."""
    word = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
    begun = sorted(option for option in options if len(word) > 3 and option.startswith(word))
    near = begun[0] if begun else nearest(word, options) if word else None
    return f"did you mean {near}?" if near else None
