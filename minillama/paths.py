"""What may stand where a path is expected, a name that is free, and what a file holds."""

from __future__ import annotations

import os
import re
from hashlib import file_digest
from pathlib import Path

from minillama.errors import InputError

__all__ = ["cache_folder", "digest", "free_name", "refuse_url"]


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/minillama, or ~/.cache/minillama."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "minillama"


def refuse_url(path: str | os.PathLike[str]) -> None:
    """Nothing here uses the network unasked.

    Raises:
        InputError: the path is a URL.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)):
        fix = "download it yourself and give the path: nothing here uses the network unasked"
        raise InputError("this is a URL, and a path is expected", where=path, fix=fix)


def free_name(path: Path) -> Path:
    """The path, or with the first of -2, -3 ... behind it that nothing has yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
