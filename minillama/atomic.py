"""Folders and files that are complete or absent: written beside their place, and renamed into it at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minillama.errors import InputError

__all__ = ["replace_file", "replace_folder"]


def replace_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Have `write` make a file beside `path`, put it on the disk, and rename it into place.

    Raises:
        InputError: the system refuses, for instance because the disk is full. Nothing half is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _or_nothing(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    return path


def replace_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Have `write` fill a folder beside `path`, put it on the disk, and rename it into place.

    What was at `path` stays until the new folder is complete.

    Raises:
        InputError: the system refuses, for instance because the disk is full. Nothing half is left.
    """
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    with _or_nothing(path, temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for file in [*temporary.iterdir(), temporary]:
            _sync(file)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    return path


@contextmanager
def _or_nothing(path: Path, temporary: Path) -> Iterator[None]:
    """Remove what was begun when the block fails, and say where the system refused."""
    try:
        yield
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif os.path.lexists(temporary):
            temporary.unlink()
        if isinstance(error, OSError):
            where = error.filename or path
            raise InputError("cannot write", where=where, found=error.strerror or error) from error
        raise


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
