"""Errors of command lines that tyro rejects, as the package's own."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, get_args, get_type_hints

from minillama.config.loader import nearest
from minillama.errors import InputError

NUMBERS = {"INT": "a whole number", "FLOAT": "a number"}


class UsageError(InputError):
    """Command line that cannot be parsed."""


@contextmanager
def own_errors(command: ModuleType, words: Sequence[str], others: Sequence[str] = ()) -> Iterator[None]:
    """Raise `UsageError` where tyro would print a box and exit; a tyro without such hooks still does.

    Args:
        command: the module, whose `Args` have the options.
        words: the command line.
        others: names of commands, one of which may have an option that this one lacks.
    """
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        yield
        return

    def handle(event: Any) -> None:
        raise _error(type(event).__name__, event, words, Options(command, others))

    with on_parse_error(handle):
        yield


@dataclass(frozen=True)
class Options:
    """Options of a command, and of the others."""

    command: ModuleType
    others: Sequence[str]

    def near(self, words: Sequence[str]) -> str | None:
        """Suggestion for the first option among words: the nearest name, one that begins so, or another command's."""
        word = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
        own = option_names(self.command.Args)
        begun = sorted(option for option in own if len(word) > 3 and option.startswith(word))
        near = begun[0] if begun else nearest(word, own) if word else None
        if near or not word:
            return f"did you mean {near}?" if near else None
        plain = (name for name in self.others if name != "train")  # whose options have dots
        modules = {name: import_module(f"minillama.commands.{name}") for name in plain}
        has = [name for name, module in modules.items() if word in option_names(module.Args)]
        return f"minillama {' or '.join(has[:2])} has {word}" if has else None


def option_names(kind: Any) -> set[str]:
    """Options of a dataclass, and of those within it: sections; or of several, the subcommands."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return {name for part in (kind if isinstance(kind, tuple) else get_args(kind)) for name in option_names(part)}
    hints = get_type_hints(kind)
    off = {f.name for f in fields(kind) if f.default is True and "FlagCreatePairsOff" in str(f.type)}
    names = {f"--{'no-' * (f.name in off)}{f.name.replace('_', '-')}" for f in fields(kind)}
    return names.union(*map(option_names, hints.values()))


def _error(kind: str, event: Any, words: Sequence[str], options: Options) -> UsageError:
    where, fix = "command line", f"{event.prog} --help"
    if kind == "MissingArgs":
        names = ", ".join(_name(missing.arg) for missing in event.missing_arguments)
        unknown = event.unrecognized_tokens
        near = options.near(unknown) or (_ordered(event, words) if unknown else None)
        return UsageError(f"missing: {names}", where=where, found=" ".join(unknown) or None, fix=near or fix)
    stray = next(
        (w for w in words if w.startswith("-") and w.partition("=")[0] not in option_names(options.command.Args)), ""
    )
    if kind == "BadValue" and event.argument.is_positional():
        name = f"--{event.argument.field.intern_name}"
        if stray or name in words:
            near = f"{_name(event.argument)} stands without {name}" if not stray else options.near([stray])
            return UsageError(f"unknown option {stray or name}", where=where, fix=near or fix)
    if kind == "UnrecognizedArgs":
        option = next((word for word in event.tokens if word.startswith("-")), None)
        what = f"unknown option {option}" if option else "an argument that belongs to no option"
        found = None if option else " ".join(event.tokens)
        return UsageError(what, where=where, found=found, fix=options.near(event.tokens) or fix)
    if kind == "InvalidChoice":
        near, what = nearest(event.value, event.choices), f"{_name(event.argument)} has no such value"
        fix = f"did you mean {near!r}?" if near else fix
        return UsageError(what, where=where, found=event.value, expected=", ".join(sorted(event.choices)), fix=fix)
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
    return UsageError("these arguments do not go together", where=where, found=" ".join(words), fix=fix)


def _ordered(event: Any, words: Sequence[str]) -> str | None:
    """The command line with the names of missing options in front of its first values."""
    parser = event.missing_arguments[0].source_parser
    path = parser.prog_suffix.split()
    if any(word.startswith("-") for word in words):
        return None
    names, values = [_name(missing.arg) for missing in event.missing_arguments], words[len(path) :]
    named = [f"{name} {shlex.quote(value)}" for name, value in zip(names, values, strict=False)]
    takes = any(argument.is_positional() for argument in parser.args)
    rest = map(shlex.quote, values[len(names) :]) if takes else ["..."]
    return " ".join([event.prog, *path, *named, *rest])


def _name(argument: Any) -> str:
    """Option as it is typed; of a positional argument its metavar, or its name where that would be a type's."""
    if argument.is_positional():
        return argument.field.argconf.metavar or str(argument.field.intern_name).upper()
    return str(argument.lowered.name_or_flags[-1])
