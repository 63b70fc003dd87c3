"""Just-in-time compilation of this folder's C++ sources, cached per machine."""

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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minillama.device import cpu_features
from minillama.files import cache_folder
from minillama.layers.hooks import is_own

FOLDER = Path(__file__).parent
KEPT = 8  # cached libraries per source: other versions, and other machines with the same home folder
MARCH = "MINILLAMA_MARCH"  # environment variable: instruction set to compile for, as of another processor (haswell)
NO_COMPILER = "it takes g++ or clang++ on Linux"
FEATURES = {"avx2": "AVX2", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX for bfloat16"}
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


class CannotBuild(Exception):
    """Native library unavailable on this machine; the message is the reason."""


@dataclass(eq=False)
class Kernel:
    """Kernel of a model's modules in C++, compiled when a model is switched to it.

    Args:
        source: file name in this folder.
        feature: processor feature that it needs, a key of `FEATURES`.
        owner: type of the modules.
        attribute: of these, set to `function`.
        function: calls the library; inputs that it does not support go to torch's operations.
    """

    source: str
    feature: str
    owner: type[nn.Module]
    attribute: str
    function: Callable[..., object]
    _library: ctypes.CDLL | None = None

    def unsupported(self) -> str | None:
        """Reason why this processor cannot run it, or None."""
        return None if cpu_features().get(self.feature) else f"the processor has no {FEATURES[self.feature]}"

    def use(self, model: nn.Module, say: Callable[[str], None] = lambda text: None) -> None:
        """Switch a model's modules to it, in place.

        Raises:
            CannotBuild: no compiler, failed compilation, or unsupported processor.
        """
        parts = [part for part in model.modules() if isinstance(part, self.owner)]
        parts = [part for part in parts if is_own(getattr(part, self.attribute) or is_own)]
        if not parts:
            return
        missing = self.unsupported()
        if missing is not None:
            raise CannotBuild(missing)
        self.library(say)
        for part in parts:
            setattr(part, self.attribute, self.function)

    def library(self, say: Callable[[str], None] = lambda text: None) -> ctypes.CDLL:
        """Shared library, loaded once per process; see `load_library`."""
        if self._library is None:
            library = load_library(self.source, say)
            if hasattr(library, "minillama_ready") and not library.minillama_ready():
                raise CannotBuild("Linux does not grant the AMX tile registers")
            self._library = library
        return self._library


def load_library(source: str, say: Callable[[str], None] = lambda text: None, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Shared library of a source file, from the cache folder or compiled now, in some seconds.

    If a compiler fails, the next one is tried. Compilation errors are cached too, so that later starts do not retry; a
    library that cannot be loaded is recompiled.

    Args:
        source: file name in this folder.
        say: called before compilation.
        flags: compiler flags beyond `FLAGS`.

    Raises:
        CannotBuild: no compiler, failed compilation, or a cache folder that is unusable or writable by others.
    """
    if not can_build():
        raise CannotBuild(NO_COMPILER)
    option = "-march=" if platform.machine() in ("x86_64", "AMD64") else "-mcpu="
    native = option + os.environ.get(MARCH, "native")
    command = [*FLAGS, *flags, native, str(FOLDER / source), *_openmp_runtime()]
    try:
        path = _library_path(source, [*compilers(), *command])
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_foreign(path.parent)
        if path.exists():
            _refuse_foreign(path)
            with suppress(OSError):
                return ctypes.CDLL(str(path))
        failure = path.with_suffix(".failed")
        if failure.exists():
            raise CannotBuild(f"{failure.read_text(encoding='utf-8')}; remove {failure} to try again")
        say(f"compiling {source}, once per machine; it takes some seconds")
        _compile(command, path)
        with suppress(OSError):  # another process may do the same
            _evict_old(path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, ValueError) as error:  # no home folder is a RuntimeError
        raise CannotBuild(str(error)) from error


def _evict_old(path: Path) -> None:
    """Keep the newest libraries of a source. A loaded library works on after its file is deleted."""
    source = path.name.rpartition("-")[0]
    found = sorted(path.parent.glob(f"{source}-*"), key=lambda file: file.stat().st_mtime)
    for file in found[:-KEPT]:
        file.unlink(missing_ok=True)


def can_build() -> bool:
    """Whether a C++ compiler is available."""
    return sys.platform.startswith("linux") and bool(compilers())


def _refuse_foreign(path: Path) -> None:
    """Reject a file that others own or may write: a library is executed."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise CannotBuild(f"others may write to {path}; set XDG_CACHE_HOME to a folder of your own")


def compilers() -> list[str]:
    """Paths of the C++ compilers, the first to be tried first."""
    return [path for path in map(shutil.which, ("g++", "clang++", "c++")) if path]


def _openmp_runtime() -> list[str]:
    """OpenMP runtime bundled with torch, if any: a second thread pool would oversubscribe the processor."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))[:1]]


def _library_path(source: str, command: Sequence[str]) -> Path:
    """Cache path per sources, command and processor: a home folder may serve several machines."""
    parts = (
        [path.read_text(encoding="utf-8") for path in (FOLDER / source, *sorted(FOLDER.glob("*.h")))],
        command,
        torch.__version__,
        sorted(cpu_features().items()),
    )
    name = f"{Path(source).stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.so"
    return cache_folder() / "native" / name


def _compile(command: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder, path.name)
        errors = []
        for compiler in compilers():
            full = [compiler, *command, "-o", str(output)]
            done = subprocess.run(full, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                output.chmod(0o700)
                os.replace(output, path)  # atomic: other processes may compile it too
                return
            errors.append(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        # a compiler that was killed, or ran out of memory or disk, reports a fatal error or no error of the source
        if all(": error: " in text and "fatal error" not in text for text in errors):
            output.write_text(errors[0], encoding="utf-8")
            os.replace(output, path.with_suffix(".failed"))
        raise CannotBuild(errors[0])
