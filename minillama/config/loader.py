"""Strict configuration loader: TOML tables to frozen dataclasses.

A field's annotation is its type, its `metadata` its range (`min`, `max` inclusive, `above`, `below`
exclusive). An unknown key, a wrong type or a value out of range is an InputError that names the file, the
line and the field.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from minillama.errors import InputError
from minillama.files import read_text, refuse_remote

T = TypeVar("T")
LARGEST = 2**63 - 1  # of whole numbers, unless a field says otherwise: tensors have no more
# bounds in a field's metadata
LIMITS = {
    "min": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "max": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


class Located:
    """Source of a table: a file (`Origin`), the command line, or unknown."""

    prefix = ""

    def at(self, key: str) -> str:
        """Location of a dotted key, for a message."""
        return self.prefix + key


@dataclass(frozen=True)
class Origin(Located):
    """TOML text and its path, for the location of keys."""

    path: Path
    text: str

    def at(self, key: str) -> str:
        """`path:line, key` for a dotted key; array elements are counted from 0, as `data.sources.1.weight`.

        A missing key is located at its table, and failing that at the file.
        """
        parts = key.split(".")
        for depth in range(len(parts), 0, -1):
            line = self._lines().get(".".join(parts[:depth]))
            if line is not None:
                return f"{self.path}:{line}, {key}"
        return f"{self.path}, {key}"

    def _lines(self) -> dict[str, int]:
        """Dotted key -> line, for tables and `key = value` lines."""
        found: dict[str, int] = {}
        counts: dict[str, int] = {}
        table = ""
        for number, line in enumerate(self.text.split("\n"), 1):
            header = re.match(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]", line)
            pair = re.match(r"\s*([\w.\-\"']+)\s*=", line)
            if header:
                table, name = "", re.sub(r"[\"'\s]", "", header[2])
                if header[1] == "[[":
                    counts[name] = counts.get(name, -1) + 1
                for depth, part in enumerate(name.split("."), 1):
                    table = f"{table}.{part}".lstrip(".")
                    parent = ".".join(name.split(".")[:depth])
                    table += f".{counts[parent]}" if parent in counts else ""
                found.setdefault(table, number)
            elif pair:
                name = re.sub(r"[\"']", "", pair[1])
                found.setdefault(f"{table}.{name}".lstrip("."), number)
        return found


def read_toml(path: Path) -> tuple[dict[str, Any], Origin]:
    """Parse a TOML file.

    Raises:
        InputError: no such file, not UTF-8, or a syntax error, with line and column.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text), Origin(path, text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        location = re.search(r" \(at line (\d+), column (\d+)\)", message)
        lines = text.split("\n")
        line, column = (location[1], location[2]) if location else (len(lines), len(lines[-1]) + 1)
        found = lines[int(line) - 1].strip() or None
        what = f"not valid TOML: {message.split(' (at')[0]}"
        raise InputError(what, where=f"{path}:{line}:{column}", found=found, fix="see https://toml.io") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, tables in tables in tables
        raise InputError("not valid TOML", where=path, found=error) from None


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Nearest choice to a misspelled word, or None."""
    plain = {re.sub(r"[\W_]", "", choice.lower()): choice for choice in choices}
    close = difflib.get_close_matches(re.sub(r"[\W_]", "", word.lower()), plain, n=1)
    return plain[close[0]] if close else None


def nearest_path(path: Path) -> str | None:
    """`did you mean PATH?` for one that is not there, with the nearest name in its folder, or None."""
    with suppress(OSError, ValueError):  # a folder that is none or may not be read, or a name that no file can have
        if near := nearest(path.name, (one.name for one in path.parent.iterdir())):
            return f"did you mean {path.with_name(near)}?"
    return None


def suggestion(word: str, choices: Iterable[str]) -> str | None:
    """`did you mean 'x'?` with the nearest choice, or None."""
    close = nearest(word, choices)
    return f"did you mean {close!r}?" if close else None


def build(
    cls: type[T], values: Mapping[str, Any], origin: Located | None = None, base: T | None = None, prefix: str = ""
) -> T:
    """Dataclass from a table.

    Args:
        cls: the dataclass.
        values: the table.
        origin: its location, for messages.
        base: an instance with the values that the table lacks; the class's defaults unless given.
        prefix: the table's dotted name.

    Raises:
        InputError: an unknown key, a missing or wrongly typed value, a value out of range.
    """
    origin, hints = origin or Located(), typing.get_type_hints(cls)
    settings = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    renamed = {f.metadata["was"]: name for name, f in settings.items() if "was" in f.metadata}
    for key in values:
        if key in renamed:
            say_renamed(origin.at(_join(prefix, key)), renamed[key])
        elif key not in settings:
            fix = suggestion(key, settings)
            expected = None if fix else f"one of {', '.join(settings)}"
            raise InputError(f"unknown key {key!r}", where=origin.at(_join(prefix, key)), expected=expected, fix=fix)
    values = {renamed.get(key, key): value for key, value in values.items()}
    made: dict[str, Any] = {} if base is None else {name: getattr(base, name) for name in settings}
    for name, f in settings.items():
        key = _join(prefix, name)
        if name in values:
            made[name] = _convert(hints[name], values[name], origin, key, made.get(name))
        elif name not in made and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{name} is missing", where=origin.at(key))
    try:
        instance = cls(**made)
    except InputError as error:
        raise located(error, origin, prefix) from None
    check(instance, origin, prefix)
    return instance


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".strip(".")


def say_renamed(where: str, name: str) -> None:
    """Deprecation notice on standard error, for a name that works for one more release."""
    print(f"{where} is now called {name}; the old name is removed in the next release", file=sys.stderr)


def located(error: InputError, origin: Located | None, prefix: str) -> InputError:
    """Error of a dataclass that names its field, with file and line added."""
    field = str(error.where or "")
    if not re.fullmatch(r"[\w.]*", field):  # it has a location already
        return error
    return error.at((origin or Located()).at(_join(prefix, field)))


def _convert(kind: Any, value: Any, origin: Located, key: str, base: Any) -> Any:
    """`value` as `kind`, or an InputError. Nothing is converted but int to float and list to tuple."""
    if (members := tagged(kind)) and isinstance(value, Mapping):
        name = value.get("name", getattr(base, "name", None))  # without a name the member that there is
        member = members[_choice(name, tuple(members), origin, f"{key}.name")]
        return build(member, value, origin, base if isinstance(base, member) else None, key)
    kind = without_none(kind)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return build(typing.cast(type, kind), value, origin, base, key)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        (item, _) = typing.get_args(kind)
        return tuple(_convert(item, each, origin, f"{key}.{i}", None) for i, each in enumerate(value))
    if typing.get_origin(kind) is Literal:
        return _choice(value, typing.get_args(kind), origin, key)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise _wrong(value, _type_name(kind), origin, key)


def _choice(value: Any, choices: tuple[Any, ...], origin: Located, key: str) -> Any:
    """`value` if it is one of the choices."""
    word = str(value).lower() if isinstance(value, bool) else value  # compile = true, where a third value is a string
    if isinstance(word, str) and word in choices:
        return word
    fix = suggestion(value, choices) if isinstance(value, str) else None
    raise _wrong(value, " or ".join(map(repr, choices)), origin, key, fix)


def _wrong(value: Any, expected: str, origin: Located, key: str, fix: str | None = None) -> InputError:
    what = f"{key} has a value of the wrong type"
    return InputError(what, where=origin.at(key), found=repr(value), expected=expected, fix=fix)


def without_none(kind: Any) -> Any:
    """The type T of an optional `T | None`, others as they are."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return next(a for a in typing.get_args(kind) if a is not type(None))
    return kind


def tagged(kind: Any) -> dict[str, type]:
    """The members of a union of dataclasses by the one value of their field `name`; none of another type."""
    members = [a for a in typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType)]
    if len(members) < 2 or not all(is_dataclass(member) for member in members):
        return {}
    return {typing.get_args(typing.get_type_hints(member)["name"])[0]: member for member in members}


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {_type_name(typing.get_args(kind)[0])}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, "a table")


def check(instance: Any, origin: Located | None = None, prefix: str = "") -> None:
    """Type check of every field of a dataclass and range check of every number, and of those in it.

    Raises:
        InputError: field, value, and type or range.
    """
    cls: Any = type(instance)
    origin, hints = origin or Located(), _hints(cls)
    for f in fields(instance):
        key, value = _join(prefix, f.name), getattr(instance, f.name)
        if not is_a(hints[f.name], value):
            kind = without_none(hints[f.name])
            choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
            expected = " or ".join(map(repr, choices)) or (
                str(kind.__name__) if is_dataclass(kind) and isinstance(kind, type) else _type_name(kind)
            )
            fix = suggestion(value, choices) if isinstance(value, str) else None
            raise _wrong(value, expected, origin, key, fix)
        items = {f"{key}.{i}": item for i, item in enumerate(value)} if isinstance(value, tuple) else {key: value}
        for name, item in items.items():
            if is_dataclass(item):
                check(item, origin, name)
            elif isinstance(item, int | float) and not isinstance(item, bool):
                check_number(item, f.metadata, origin.at(name), name)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def is_a(kind: Any, value: Any) -> bool:
    """Whether a value is of a type; an integer is a float too, true is no integer, and a string no list of strings."""
    outer, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if outer in (Union, types.UnionType):
        return any(is_a(one, value) for one in inner)
    if outer is Annotated:
        return is_a(inner[0], value)
    if outer is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if outer is tuple:
        return isinstance(value, tuple) and all(is_a(inner[0], item) for item in value)
    if outer in (Sequence, Iterable, Set):
        if hasattr(value, "tolist") and inner[0] not in (float, str, bool):  # an array or tensor of ids
            value = value.tolist()
        if not isinstance(value, list | tuple | set | frozenset):
            return isinstance(value, outer) and not isinstance(value, str | bytes | Mapping)
        kinds = set(map(type, value))
        is_plain = kinds == {inner[0]} and inner[0] in (int, str)
        return isinstance(value, outer) and (is_plain or all(map(partial(_item_is_a, inner[0]), value)))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    kind = outer or kind
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(kind) if not name.startswith("_"))
    known = isinstance(kind, type) and kind is not type
    return not known or isinstance(getattr(value, "_orig_mod", value), kind)  # which torch.compile has wrapped


def _item_is_a(kind: Any, item: Any) -> bool:
    """The same of an item of a list, where whole numbers may be those of an array."""
    return is_a(kind, item) or (kind is int and is_index(item))


def is_index(item: Any) -> bool:
    """Whether it is a whole number, of an array or tensor too."""
    try:
        operator.index(item)
    except TypeError:
        return False
    return not isinstance(item, bool) and getattr(item, "ndim", 0) == 0


def check_number(value: float, limits: Mapping[str, float], where: str, key: str) -> None:
    """Refuse a number out of range, or one that is not finite."""
    limits = {"max": LARGEST, **limits} if isinstance(value, int) else limits
    bounds = {name: limits[name] for name in LIMITS if name in limits}
    finite = value == value and abs(value) != math.inf  # isfinite takes no integer over 1e308
    if not finite or not all(LIMITS[name][1](value, bound) for name, bound in bounds.items()):
        shown = {name: bound for name, bound in bounds.items() if bound != LARGEST or value > LARGEST}
        words = " and ".join(f"{LIMITS[name][0]} {bound}" for name, bound in shown.items())
        expected = ", ".join(part for part in ("" if finite else "a finite number", words) if part)
        raise InputError(f"{key} is out of range", where=where, found=value, expected=expected)


def config_folder(kind: str) -> Path:
    """Folder configs/KIND of the clone, or of the installed package."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs" / kind
    return inside if inside.is_dir() else package.parent / "configs" / kind


def config_names(kind: str) -> list[str]:
    """Names of the files in configs/KIND, without .toml."""
    return sorted(path.stem for path in config_folder(kind).glob("*.toml"))


def config_path(kind: str, name: str) -> Path:
    """Configuration file of a path that ends in .toml, or of a name in configs/KIND.

    Raises:
        InputError: neither, with the nearest name.
    """
    refuse_remote(name)
    path = Path(name)
    if path.suffix == ".toml" and os.path.isfile(path):  # False for a name that no file can have, too
        return path
    names = config_names(kind)
    if name in names:
        return config_folder(kind) / f"{name}.toml"
    what = f"no {kind} configuration of that name" + ("" if os.path.exists(path) else ", and no such file")
    expected = f"a path ending in .toml, or one of {', '.join(names)}"
    if kind == "model":
        expected = f"a model's folder or file, a .toml file, or one of {len(names)} names that `minillama plan` lists"
    fix = suggestion(name, names)
    if kind == "train" and os.path.exists(path):
        is_run = (path / "config.toml").is_file()
        fix = f"to go on with this run: --out {name} --resume" if is_run else f"to train on it: --data.sources {name}"
    raise InputError(what, found=name, expected=expected, fix=fix)


def to_dict(instance: Any) -> dict[str, Any]:
    """Nested plain values without None, as `tomli_w.dumps` takes them."""

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs if value is not None}

    return asdict(instance, dict_factory=plain)
