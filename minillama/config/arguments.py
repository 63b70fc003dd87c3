"""Check of a function's arguments against its annotations, as of settings."""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, Union

from minillama.config.loader import check_number, is_a, without_none
from minillama.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
Count = Annotated[int, ("min", 0)]
Positive = Annotated[int, ("min", 1)]
Fraction = Annotated[float, ("min", 0), ("below", 1)]
NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", bytes: "bytes"}
NAMES |= {Path: "a path", os.PathLike: "a path"}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments of another type than the annotations', or out of their range, before anything is done.

    Raises:
        InputError: function and argument, the value, the types that it takes.
    """
    parameters, name = inspect.signature(function).parameters.values(), function.__qualname__.removesuffix(".__init__")
    places = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hints, args = _hints(function), tuple(map(_path, args))  # type: ignore[assignment]
        if kwargs:
            kwargs = {argument: _path(value) for argument, value in kwargs.items()}  # type: ignore[assignment]
        for argument, value in (*zip(places, args, strict=False), *kwargs.items()):
            if argument in hints:
                _check(hints[argument], value, name, argument)
        return function(*args, **kwargs)  # Python itself says which are missing or too many

    return call


@cache
def _hints(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    found = typing.get_type_hints(function, include_extras=True).items()
    return {
        name: kind
        for name, kind in found
        if name in parameters and parameters[name].kind != inspect.Parameter.VAR_KEYWORD
    }


def _check(kind: Any, value: Any, name: str, argument: str) -> None:
    if type(value).__module__ == "numpy" and value.ndim == 0:
        value = value.item()
    if not is_a(kind, value) and not (type(value) is int and value in (0, 1) and is_a(kind, bool(value))):
        raise InputError(
            f"{argument} has a value of the wrong type",
            where=f"{name}, {argument}",
            found=f"{value!r:.100}, of type {type(value).__name__}",
            expected=described(kind),
            fix=_remedy(without_none(kind), value),
        )
    if isinstance(value, int | float) and typing.get_origin(bare := without_none(kind)) is Annotated:
        check_number(value, dict(bare.__metadata__), f"{name}, {argument}", argument)


def _path(value: Any) -> Any:
    """The name of a path that is no `Path`, of which `str` may give something else; others as they are."""
    return os.fspath(value) if hasattr(type(value), "__fspath__") and not isinstance(value, Path) else value


def _remedy(kind: Any, value: Any) -> str | None:
    """What makes a value of the type: of a name or path the call that reads it."""
    if kind is str and isinstance(value, list | tuple):
        return "give one at a time, or the function for several"
    name = getattr(kind, "__name__", "")
    makers = [f"{name}.{maker}" for maker in ("from_pretrained", "load") if hasattr(kind, maker)]
    makers += ["load_run_config"] if name == "RunConfig" else []
    return f"{makers[0]}({value!r})" if makers and isinstance(value, str) else f"{makers[0]}(...)" if makers else None


def described(kind: Any) -> str:
    """A type in words."""
    outer, inner = typing.get_origin(kind), typing.get_args(kind)
    if outer in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(one) for one in inner))
    if outer is Annotated:
        return described(inner[0])
    if outer is typing.Literal:
        return " or ".join(map(repr, inner))
    if outer is not None and isinstance(outer, type) and inner and outer is not type:
        if issubclass(outer, typing.cast(type, Callable)):
            return "a function"
        if outer.__name__ in ("Sequence", "Iterable", "Set", "tuple", "list"):
            return f"a list, each {described(inner[0])}"
        return NAMES.get(outer) or f"a {outer.__name__}"
    return "None" if kind is type(None) else NAMES.get(kind) or f"a {getattr(kind, '__name__', kind)}"
