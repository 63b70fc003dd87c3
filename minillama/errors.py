"""User error: what, where, found, expected, fix; the error of an optional package."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

LONGEST = 1000
"""Characters of a part of a message at most."""


class InputError(ValueError):
    """Error that a user can correct: in a file, a setting, a command line.

    Args:
        what: the error in one sentence, without a period.
        where: file and field, as `runs/a/config.toml:12, train.lr`.
        found: the value found.
        expected: the values accepted.
        fix: the next step, as an instruction.

    `str()` puts each part that was given on a line of its own. It is a ValueError, so that code
    which imports minillama can catch it as one; the command line prints it without a traceback.

    A part may quote a stranger's file: `str()` escapes what is not printable, and leaves out the middle of a long one.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.found, self.expected, self.fix = what, where, found, expected, fix
        parts = [("where", where), ("found", found), ("expected", expected), ("do", fix)]
        lines = [f"  {name}: {printable(str(value))}" for name, value in parts if value is not None]
        super().__init__("\n".join([printable(str(what)), *lines]))

    def parts(self) -> dict[str, str]:
        """The parts that were given, by name."""
        names = ("what", "where", "found", "expected", "fix")
        return {name: str(value) for name in names if (value := getattr(self, name)) is not None}

    def at(self, where: object) -> InputError:
        """The same error at another place."""
        return InputError(self.what, where=where, found=self.found, expected=self.expected, fix=self.fix)


def printable(text: str) -> str:
    """Text on one line whose characters cannot act on a terminal, without the middle of a long one."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    if text.isprintable():
        return text
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return escaped if len(escaped) <= LONGEST else f"{escaped[: LONGEST // 2]} ... {escaped[-LONGEST // 2 :]}"


def optional_import(module: str, purpose: str, extra: str) -> Any:
    """Module of an optional package.

    Raises:
        InputError: it cannot be imported; `purpose` needs it, `extra` of this package installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        what = f"{purpose} needs the package {module.partition('.')[0]}"
        needs = (need for need in missing(extra) if need.partition(">")[0] == module.partition(".")[0])
        raise InputError(what, found=error, fix=f"pip install '{next(needs, f'minillama[{extra}]')}'") from None


def missing(extra: str) -> list[str]:
    """Requirements of an extra that are not installed, as `gguf>=0.17`; none where this package is not installed."""
    from packaging.requirements import Requirement

    def is_here(need: Requirement) -> bool:
        try:
            return version(need.name) in need.specifier
        except PackageNotFoundError:
            return False

    try:
        needs = [Requirement(line) for line in requires("minillama") or ()]
    except PackageNotFoundError:
        return []
    asked = [n for n in needs if n.marker and n.marker.evaluate({"extra": extra}) > n.marker.evaluate({"extra": ""})]
    return [f"{need.name}{need.specifier}" for need in asked if not is_here(need)]
