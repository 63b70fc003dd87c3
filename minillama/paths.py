"""What may stand where a path is expected."""

from __future__ import annotations

import os
import re

from minillama.errors import InputError

__all__ = ["refuse_url"]


def refuse_url(path: str | os.PathLike[str]) -> None:
    """Nothing here uses the network unasked.

    Raises:
        InputError: the path is a URL.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)):
        fix = "download it yourself and give the path: nothing here uses the network unasked"
        raise InputError("this is a URL, and a path is expected", where=path, fix=fix)
