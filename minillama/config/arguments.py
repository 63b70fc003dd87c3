"""Check of a function's arguments against its annotations, as of settings."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from functools import cache, wraps
from numbers import Number
from typing import Annotated, Any, ParamSpec, TypeVar, Union

from minillama.config.loader import check_number, is_a, without_none
from minillama.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
Count = Annotated[int, ("min", 0)]
Positive = Annotated[int, ("min", 1)]
Fraction = Annotated[float, ("min", 0), ("below", 1)]
NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", bytes: "bytes"}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments of another type than the annotations', or out of their range, before anything is done.

    Raises:
        InputError: function and argument, the value, the types that it takes.
    """
    signature, name = inspect.signature(function), function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # which Python says itself
            return function(*args, **kwargs)
        for argument, kind in _hints(function).items():
            if argument in given:
                _check(kind, given[argument], name, argument)
        return function(*args, **kwargs)

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
    if type(value).__module__ == "numpy" and isinstance(value, Number):
        value = value.item()  # type: ignore[attr-defined]
    bare = without_none(kind)
    if not is_a(kind, value):
        raise InputError(
            f"{argument} has a value of the wrong type",
            where=f"{name}, {argument}",
            found=f"{value!r:.100}, of type {type(value).__name__}",
            expected=described(kind),
            fix=_remedy(bare, value),
        )
    if typing.get_origin(bare) is Annotated and value is not None:
        check_number(value, dict(bare.__metadata__), f"{name}, {argument}", argument)


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
        if outer.__name__ in ("Sequence", "Iterable", "tuple", "list"):
            return f"a list, each {described(inner[0])}"
        return f"a {outer.__name__}"
    return "None" if kind is type(None) else NAMES.get(kind) or f"a {getattr(kind, '__name__', kind)}"
