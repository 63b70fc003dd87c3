"""Compiling the step once for a machine, and finding it again."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from minillama.device import compiler_missing
from minillama.paths import cache_folder

__all__ = ["CannotBuild", "can_build", "load_library"]

SOURCE = Path(__file__).with_name("step.cpp")
# Sums may be taken in any order, as vectors need it; everything else is as IEEE 754 says, NaN included.
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)


class CannotBuild(Exception):
    """Why there is no compiled step on this machine."""


def load_library(say: Callable[[str], None] = lambda text: None) -> ctypes.CDLL:
    """The compiled step, from the cache folder or compiled now, in some seconds.

    Args:
        say: told before it is compiled.

    Raises:
        CannotBuild: no compiler, or it failed; a cache folder that cannot be used, or that others may write to.
    """
    command = _command()
    try:
        path = _place(command)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_foreign(path.parent)
        if not path.exists():
            say("compiling the decode step, once for this machine; it takes some seconds")
            _compile(command, path)
        _refuse_foreign(path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:  # no home folder is a RuntimeError
        raise CannotBuild(str(error)) from error


def can_build() -> bool:
    """Whether a compiler is there."""
    return sys.platform.startswith("linux") and compiler_missing(torch.device("cpu")) is None


def _refuse_foreign(path: Path) -> None:
    """A library is run: nobody else may have written it."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise CannotBuild(f"others may write to {path}; set XDG_CACHE_HOME to a folder of your own")


def _command() -> list[str]:
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None or not can_build():
        raise CannotBuild("it takes g++ or clang++ on Linux")
    machine = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    # torch's own threads, where it brings them: a second pool would fight with the first for the processor
    threads = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return [compiler, *FLAGS, machine, str(SOURCE), *map(str, threads[:1])]


def _place(command: list[str]) -> Path:
    """Where the library of this source, command and processor lies: a home folder may serve several machines."""
    parts = (
        SOURCE.read_text(encoding="utf-8"),
        command,
        torch.__version__,
        sorted(torch.cpu.get_capabilities().items()),
    )
    return cache_folder() / "native" / f"step-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.so"


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotBuild(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
        made.chmod(0o700)
        os.replace(made, path)  # whole or absent, whoever else compiles it now
