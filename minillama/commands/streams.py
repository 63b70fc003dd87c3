"""Standard streams that are closed, full, or of an encoding that lacks a character."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from minillama.errors import InputError

NAMES = ("stdin", "stdout", "stderr")


def open_closed() -> None:
    """Null device in place of closed streams; characters that an encoding lacks are escaped.

    A file that is opened later would get the number of a closed one, and what is printed would be written to it.
    """
    for number, name in enumerate(NAMES):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """InputError for an error of the system that nothing else has named; a closed pipe stays one.

    Raises:
        BrokenPipeError: from a library, too, that exits at one.
    """
    try:
        yield
        sys.stdout.flush()  # a closed pipe or a full disk shows here, and not while the interpreter shuts down
    except BrokenPipeError:
        discard_output()
        raise
    except OSError as error:
        if error.filename is None:
            discard_output()  # else the interpreter tries once more at its end
        where = "standard output, or a file" if error.filename is None else error.filename
        raise InputError("the system refuses", where=where, found=error.strerror or error) from error
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            discard_output()
            raise error.__context__ from None
        raise


def discard_output() -> None:
    """Send the rest of a buffer that has nowhere to go to the null device."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
