"""The one error a user meets: what, where, found, expected, what to do."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(ValueError):
    """Something that a person can put right: a file, a setting, a command line.

    Args:
        what: the fault in one sentence, without a full stop.
        where: file and field, as `runs/a/config.toml:12, train.lr`.
        found: what stood there.
        expected: what would have been accepted.
        fix: what to do next, as an instruction.

    `str()` puts each part that was given on a line of its own. It is a ValueError, so that code
    which imports minillama can catch it as one; the command line prints it without a traceback.
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
        super().__init__("\n".join([what] + [f"  {name}: {value}" for name, value in parts if value is not None]))
