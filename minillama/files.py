"""Atomic writes, files of strangers, SHA-256 digests, unused names, the cache folder."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, TypeVar

from minillama.errors import InputError

T = TypeVar("T")
_DAMAGE: tuple[type[Exception], ...] = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_DAMAGE += (RecursionError, EOFError, NotImplementedError, csv.Error, zlib.error)
LARGEST = 2**25
"""Bytes of a configuration at most: Python's objects take twenty times as much."""


def cache_folder() -> Path:
    """Cache folder: $XDG_CACHE_HOME/minillama, or ~/.cache/minillama."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "minillama"


def refuse_url(path: str | os.PathLike[str]) -> None:
    """Refuse a URL: nothing here uses the network unasked.

    Raises:
        InputError: the path is a URL.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)):
        fix = "download it yourself and give the path: nothing here uses the network unasked"
        raise InputError("this is a URL, and a path is expected", where=path, fix=fix)


def refuse_remote(path: str | os.PathLike[str]) -> None:
    """Refuse a URL, and a name of the Hugging Face hub where no such path exists.

    Raises:
        InputError: with the command that downloads it.
    """
    refuse_url(path)
    found = Path(path)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)) and not (found.exists() or found.parent.is_dir()):
        fix = f"if this is a model of the Hugging Face hub: hf download {path} --local-dir {found.name}"
        raise InputError("no such path", where=path, fix=f"{fix}; then give {found.name}")


def model_folder(path: Path) -> Path:
    """Model folder of a run's folder, said on standard error; another path as it is.

    It is the run's last model, and before the end that of its newest checkpoint.

    Raises:
        InputError: no file can have this name, or it may not be read.
    """
    with reading(path, "this path"):
        if not (path / "config.toml").is_file() or (path / "config.json").exists():
            return path
        steps = [step for step in (path / "checkpoints").glob("step-*") if step.name[5:].isdigit()]
        found = path / "model"
        if not found.is_dir():
            found = max(steps, key=lambda step: int(step.name[5:]), default=path)
    print(f"{path} is a run; its {'model' if found.name == 'model' else 'newest checkpoint'}: {found}", file=sys.stderr)
    return found


def regular(path: str, flags: int) -> int:
    """Opener for `open`: regular files alone, and for writing none that a link leads to.

    A pipe without a writer is waited for without end, a device is read without end, and what a link leads to may be
    someone else's.

    Raises:
        OSError: another kind of file.
    """
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    flags |= getattr(os, "O_NONBLOCK", 0) | (getattr(os, "O_NOFOLLOW", 0) if writes else 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


@contextmanager
def reading(path: Path, what: str = "this file", fix: str | None = None) -> Iterator[None]:
    """InputError for an error of the system while `path` is read, or a name that no file can have."""
    if "\0" in str(path):  # a ValueError of `open`, not of the system
        raise InputError(f"cannot read {what}: a null character in its name", where=path, fix=fix)
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {what}: {error.strerror or error}", where=path, fix=fix) from None


@contextmanager
def parsing(where: object, what: str = "this is damaged, or not what it should be") -> Iterator[None]:
    """InputError for what code raises that takes the structure of someone else's file for granted."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(what, where=where, found=f"{type(error).__name__}: {error}") from error


def bound(most: int) -> int:
    """A bound on files of others, times the environment variable MINILLAMA_LIMITS."""
    factor = os.environ.get("MINILLAMA_LIMITS", "1")
    return int(most * float(factor)) if re.fullmatch(r"[0-9]{1,9}([.][0-9]{1,9})?", factor) else most


class LargeInputError(InputError):
    """Larger than a bound, that of no real file."""


def check_size(size: int, most: int, where: object, unit: str = "bytes") -> None:
    """Refuse what is larger than a bound, that of no real file.

    Raises:
        LargeInputError: it is.
    """
    most = bound(most)
    if size > most:
        fix = (
            "if it is what it should be, set MINILLAMA_LIMITS=10 in the environment: bounds are ten times as high then"
        )
        expected = f"at most {most:,} {unit}"
        raise LargeInputError("this is too large", where=where, found=f"{size:,} {unit}", expected=expected, fix=fix)


def read_bytes(path: Path, fix: str | None = None, most: int = LARGEST) -> bytes:
    """The whole of a file of someone else, which is a regular one and not too large.

    Raises:
        InputError: it is not, or cannot be read.
    """
    with reading(path, path.name, fix), open(path, "rb", opener=regular) as file:
        check_size(os.fstat(file.fileno()).st_size, most, path)
        return file.read()


def read_text(path: Path, fix: str | None = None, most: int = LARGEST) -> str:
    """The whole of a file of someone else, which is UTF-8, without its byte order mark.

    Raises:
        InputError: it is not, or as `read_bytes`.
    """
    try:
        return read_bytes(path, fix, most).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError("this file is not UTF-8 text", where=path, found=error) from None


def read_json(path: Path, fix: str | None = None, most: int = LARGEST) -> dict[str, Any]:
    """The whole of a file of someone else, which is a JSON object.

    Raises:
        InputError: it is not, is nested too deep, holds a lone surrogate, or as `read_text`.
    """
    text = read_text(path, fix, most)
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        found = f"{str(error)[:200]}; it starts with {text[:40]!r}"
        raise InputError(f"not a readable {path.name}: not JSON, or cut", where=path, found=found, fix=fix) from None
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not a JSON object", where=path, found=type(value).__name__)
    return value


def free_name(path: Path) -> Path:
    """Unused path: the path itself, or with the first free suffix of -2, -3 ..."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if it is there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def stamp(paths: Iterable[Path]) -> str:
    """Digest of the names, sizes and times of files, and of those in folders; what is not there counts as nothing.

    Raises:
        InputError: a URL.
    """
    stats = []
    for path in paths:
        refuse_url(path)
        for file in sorted(path.iterdir()) if path.is_dir() else [path] * path.exists():
            status = file.stat()
            stats.append([file.name, status.st_size, status.st_mtime_ns])
    return sha256(json.dumps(stats).encode()).hexdigest()[:16]


def complete_lines(path: Path, cuts: bool = True) -> list[str]:
    """Lines of a file to which lines are appended, without a last one that was not written to its end.

    Args:
        path: the file.
        cuts: cut that one off the file, which this process writes to; someone else's stays as it is.

    Raises:
        InputError: not UTF-8, not a regular file, or the system refuses.
    """
    if not path.exists():
        return []
    with reading(path), open(path, "r+b" if cuts else "rb", opener=regular) as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if cuts:
            file.truncate(end)
    with parsing(path, "this file is not UTF-8 text"):
        return data[:end].decode().split("\n")[:-1]  # not splitlines, which cuts at U+2028


def complete_records(path: Path, make: Callable[[Any], T], what: str, cuts: bool = True) -> list[T]:
    """What `make` makes of each of the `complete_lines` of a JSONL file.

    Raises:
        InputError: a line of something else, as `what` says.
    """
    made = []
    for number, line in enumerate(complete_lines(path, cuts), 1):
        with parsing(f"{path}:{number}", what):
            made.append(make(json.loads(line)))
    return made


def json_lines(records: Iterable[object]) -> str:
    """Text of JSONL."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def append_lines(path: Path, records: Iterable[object]) -> None:
    """Append records to a JSONL file, which `complete_lines` reads.

    Raises:
        InputError: the system refuses, or the path is a link.
    """
    try:
        with open(path, "a", encoding="utf-8", opener=regular) as file:
            file.write(json_lines(records))
    except OSError as error:
        raise InputError("cannot write", where=path, found=error.strerror) from error


def replace_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Atomic file write: `write` makes a temporary file beside `path`, which is synced and renamed.

    Raises:
        InputError: the system refuses, for instance because the disk is full. No partial output is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _or_nothing(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
        with suppress(FileNotFoundError):  # who waited for the file may have moved it and removed the folder
            _sync(path.parent)
    return path


def replace_text(path: Path, text: str) -> Path:
    """Atomic write of a text in UTF-8, see `replace_file`."""
    return replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def replace_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Atomic folder write: `write` fills a temporary folder beside `path`, which is synced and renamed.

    The old content of `path` stays until the new folder is complete.

    Raises:
        InputError: the system refuses, for instance because the disk is full. No partial output is left.
    """
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    with _or_nothing(path, temporary):
        remove(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        for file in [*temporary.iterdir(), temporary]:
            _sync(file)
        remove(old)
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
    """Remove the temporary file when the block fails, and name the path that the system refused."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            remove(temporary)
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
