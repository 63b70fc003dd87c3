"""Compiling a C++ file of this folder once for a machine, and finding it again."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from minillama.device import compiler_missing
from minillama.files import cache_folder

__all__ = ["CannotBuild", "can_build", "load_library", "prepare"]

FOLDER = Path(__file__).parent
KEPT = 8  # libraries of one source: of other versions, and of other machines with the same home folder
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


class CannotBuild(Exception):
    """Why there is no compiled code on this machine."""


def prepare(source: str, missing: str | None, library: Callable[[], ctypes.CDLL], say: Callable[[str], None]) -> None:
    """Have a library ready before a model is changed that will call it.

    Args:
        source: a name in this folder.
        missing: why this processor does not run it, or None.
        library: what looks it up for the calls, once a process.
        say: told before it is compiled.

    Raises:
        CannotBuild: something is missing, or `load_library` says so.
    """
    if missing is not None:
        raise CannotBuild(missing)
    load_library(source, say)
    library()


def load_library(source: str, say: Callable[[str], None] = lambda text: None, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of a source file, from the cache folder or compiled now, in some seconds.

    Where a compiler fails the next one is tried. What the last one said is kept too, so that no start after that tries
    again; a library that cannot be loaded is made anew.

    Args:
        source: a name in this folder.
        say: told before it is compiled.
        flags: for the compiler, beyond `FLAGS`.

    Raises:
        CannotBuild: no compiler, or it failed; a cache folder that cannot be used, or that others may write to.
    """
    compilers = _compilers()
    command = [*FLAGS, *flags, _for_this_processor(), str(FOLDER / source), *_threads()]
    try:
        path = _place(source, [*compilers, *command])
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_foreign(path.parent)
        if path.exists():
            _refuse_foreign(path)
            with suppress(OSError):
                return ctypes.CDLL(str(path))
        failure = path.with_suffix(".failed")
        if failure.exists():
            raise CannotBuild(f"{failure.read_text(encoding='utf-8')}; remove {failure} to try again")
        say(f"compiling {source}, once for this machine; it takes some seconds")
        _compile(compilers, command, path)
        with suppress(OSError):  # another process may do the same
            _forget_old(path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, ValueError) as error:  # no home folder is a RuntimeError
        raise CannotBuild(str(error)) from error


def _forget_old(path: Path) -> None:
    """Leave the newest libraries of a source. One that runs now goes on, wherever its file is."""
    source = path.name.rpartition("-")[0]
    found = sorted(path.parent.glob(f"{source}-*"), key=lambda file: file.stat().st_mtime)
    for file in found[:-KEPT]:
        file.unlink(missing_ok=True)


def can_build() -> bool:
    """Whether a compiler is there."""
    return sys.platform.startswith("linux") and compiler_missing(torch.device("cpu")) is None


def _refuse_foreign(path: Path) -> None:
    """A library is run: nobody else may have written it."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise CannotBuild(f"others may write to {path}; set XDG_CACHE_HOME to a folder of your own")


def _compilers() -> list[str]:
    found = [path for path in map(shutil.which, ("g++", "clang++", "c++")) if path]
    if not found or not can_build():
        raise CannotBuild("it takes g++ or clang++ on Linux")
    return found


def _for_this_processor() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _threads() -> list[str]:
    """The threads that torch brings, where it does: a second pool would fight with the first for the processor."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))[:1]]


def _place(source: str, command: Sequence[str]) -> Path:
    """Where the library of these sources, commands and processor lies: a home folder may serve several machines."""
    parts = (
        [path.read_text(encoding="utf-8") for path in (FOLDER / source, *sorted(FOLDER.glob("*.h")))],
        command,
        torch.__version__,
        sorted(torch.cpu.get_capabilities().items()),
    )
    name = f"{Path(source).stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.so"
    return cache_folder() / "native" / name


def _compile(compilers: Sequence[str], command: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        said = []
        for compiler in compilers:
            full = [compiler, *command, "-o", str(made)]
            done = subprocess.run(full, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                made.chmod(0o700)
                os.replace(made, path)  # whole or absent, whoever else compiles it now
                return
            said.append(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        # a compiler that was stopped, or found no memory or disk, ends with a fatal error or says nothing of the source
        if all(": error: " in text and "fatal error" not in text for text in said):
            made.write_text(said[0], encoding="utf-8")
            os.replace(made, path.with_suffix(".failed"))
        raise CannotBuild(said[0])
