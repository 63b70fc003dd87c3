"""Checkpoint folder: atomic write, manifest with SHA-256.

`checkpoints/step-N/` is a model folder with three files more: optimizer.safetensors (tensors named PARAMETER/NAME; with
parts of them in several processes a file of each, see `parts.py`), run.json (step, tokens, seconds, data fingerprint
and so on) and manifest.json, the size and SHA-256 of every other file. A checkpoint is written to a temporary folder
beside and renamed when all of it is on the disk: it is complete or absent.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.errors import InputError
from minillama.files import digest, free_name, read_json, remove, replace_file, replace_folder
from minillama.runs import parts

MANIFEST = "manifest.json"
NEEDED = ("config.json", parts.PATTERN, "run.json")
PATIENCE, GRACE = 600.0, 5.0  # seconds in which all processes have written their parts, also when one has failed
RUN = ("step", "tokens", "seconds", "data", "tokenizer", "guard", "record")

WriteModel = Callable[[Path, Mapping[str, Tensor]], None]
"""Writes a model folder's files from tensors into a path."""


class Checkpoint:
    """A complete checkpoint on disk.

    Args:
        verify: compare the SHA-256 of every file with the manifest's; else sizes alone.

    Raises:
        InputError: a file is missing or is not what the manifest says.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path = path
        manifest = read_json(path / MANIFEST)
        missing = [pattern for pattern in NEEDED if not any(fnmatchcase(name, pattern) for name in manifest)]
        odd = [name for name, known in manifest.items() if Path(name).name != name or not _is_entry(known)]
        if missing or odd:
            found = ", ".join(odd) or f"no entry for {', '.join(missing)}"
            what = "the manifest of this checkpoint has an unknown format"
            raise InputError(what, where=path / MANIFEST, found=found)
        for name, known in manifest.items():
            _check(path / name, known, verify)
        self.run = read_json(path / "run.json")
        if any(key not in self.run for key in RUN) or type(self.run["step"]) is not int:
            found, expected = ", ".join(self.run), ", ".join(RUN)
            what = "this checkpoint was written by another version"
            raise InputError(what, where=path / "run.json", found=found, expected=expected)
        if self.step < 0:
            raise InputError("no step of a run", where=path / "run.json", found=self.step, expected="0 or more")

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        step: int = self.run["step"]
        return step

    def optimizer_tensors(self) -> dict[str, parts.Stored]:
        """Optimizer state, by PARAMETER/NAME.

        Raises:
            InputError: a file is damaged.
        """
        return parts.read(sorted(self.path.glob(parts.PATTERN)))


@dataclass(frozen=True)
class CheckpointCopy:
    """Contents of a checkpoint, in tensors that are no longer changed.

    Args:
        model: by parameter name.
        optimizer: by PARAMETER/NAME.
        run: JSON values, `step` among them.
        places: of the tensors in `optimizer` that are parts.
        index: of this process; the first one has the model.
        count: processes that have parts, the first ones.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    run: Mapping[str, Any]
    places: Mapping[str, parts.Place] = field(default_factory=dict)
    index: int = 0
    count: int = 1

    def check(self) -> None:
        """Refuse a NaN or infinite weight or moment; an objective's own state may have them.

        Raises:
            InputError: the tensor's name.
        """
        for name, tensor in [*self.model.items(), *self.optimizer.items()]:
            is_checked = tensor.is_floating_point() and not name.startswith("objective/")
            if is_checked and not torch.isfinite(tensor).all():
                what = f"a checkpoint with NaN or infinite values is not written, step {self.run['step']}"
                raise InputError(what, where=name, fix="lower optim.lr, and resume from an earlier checkpoint")


def save_checkpoint(
    folder: Path, contents: CheckpointCopy, write_model: WriteModel, over: threading.Event | None = None
) -> Path:
    """Write `folder/step-N`, or this process's part of it, which the first one moves there when it has all.

    Args:
        folder: of all checkpoints.
        contents: of this one.
        write_model: see `WriteModel`.
        over: set when the run has failed, so that other processes may write no more.

    Raises:
        InputError: the system refuses, for instance because the disk is full, or a value is NaN or infinite; no partial
            checkpoint is left.
    """
    step = contents.run["step"]
    staged, names = folder / f".parts-{step}", [parts.file_name(i, contents.count) for i in range(contents.count)]
    if contents.index:
        name = names[contents.index]
        try:
            contents.check()
            return replace_file(staged / name, lambda path: parts.write(path, contents.optimizer, contents.places))
        except InputError as error:
            with suppress(OSError):
                staged.mkdir(parents=True, exist_ok=True)
                (staged / f"{name}.failed").write_text(f"{error.what}: {error.found}", encoding="utf-8")
            raise
    contents.check()

    def write(path: Path) -> None:
        write_model(path, contents.model)
        parts.write(path / names[0], contents.optimizer, contents.places)
        _write_json(path / "run.json", contents.run)
        for name in names[1:]:
            _wait_for(staged / name, over).rename(path / name)
        shutil.rmtree(staged, ignore_errors=True)
        known = {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in sorted(path.iterdir())}
        _write_json(path / MANIFEST, known)

    return replace_folder(folder / f"step-{step}", write)


def _wait_for(path: Path, over: threading.Event | None) -> Path:
    """The file, when another process has written it."""
    failed, until = path.with_name(f"{path.name}.failed"), time.monotonic() + PATIENCE
    while not path.exists():
        if over is not None and over.is_set():
            until = min(until, time.monotonic() + GRACE)
        if failed.exists() or time.monotonic() > until:
            found = failed.read_text(encoding="utf-8") if failed.exists() else "nothing"
            fix = "all processes must write to the same file system"
            raise InputError("a process has not written its part", where=path, found=found, fix=fix)
        time.sleep(0.02)
    return path


def newest_checkpoint(folder: Path, verify: bool = True) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Newest complete checkpoint, and those passed over, with the reason.

    Raises:
        InputError: there are checkpoints, and all of them are damaged.
    """
    passed = {path: f"{path}: incomplete" for path in sorted(folder.glob(".step-*.tmp"))}
    whole = {folder / f"step-{step}" for step in steps(folder)}
    passed |= {path: f"{path}: there is no {MANIFEST}" for path in sorted({*folder.glob("step-*")} - whole)}
    damaged: dict[Path, str] = {}
    for step in reversed(steps(folder)):
        path = folder / f"step-{step}"
        try:
            return Checkpoint(path, verify), damaged | passed
        except InputError as error:
            damaged[path] = f"{error.where}: {error.what}"
    if damaged:
        raise InputError(
            "every checkpoint of this run is damaged",
            where=folder,
            found="; ".join(damaged.values()),
            fix="restore one from a copy, or start a new run",
        )
    return None, passed


def set_aside(paths: Iterable[Path]) -> None:
    """Rename checkpoints that were passed over, so that they neither count among the newest nor are removed."""
    for path in paths:
        if path.name.startswith("step-"):
            path.rename(free_name(path.with_name(f"damaged-{path.name}")))


def steps(folder: Path) -> list[int]:
    """Steps of all complete checkpoints, in order."""
    names = (path.name for path in folder.glob("step-*") if (path / MANIFEST).is_file())
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-(0|[1-9][0-9]*)", name))


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the `keep` newest checkpoints and that of step `best`, and the remains of killed processes."""
    for step in steps(folder)[:-keep]:
        if step != best:  # renamed first: a process that is killed leaves no half of one under its name
            (folder / f"step-{step}").rename(folder / f".step-{step}.old")
    _remove([*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")])
    remove_parts(folder)


def remove_parts(folder: Path) -> None:
    """Remove the parts that processes of an attempt wrote which is over."""
    _remove(folder.glob(".parts-*"))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            remove(path)


def _is_entry(known: object) -> bool:
    return isinstance(known, dict) and known.keys() >= {"bytes", "sha256"}


def _check(file: Path, known: dict[str, Any], verify: bool) -> None:
    """Compare a file with its entry in the manifest."""
    if not file.is_file():
        raise InputError("a file of the checkpoint is missing", where=file)
    size = file.stat().st_size
    if size != known["bytes"]:
        what = "a file of the checkpoint has another size than when it was written"
        raise InputError(what, where=file, found=f"{size} bytes", expected=known["bytes"])
    if verify and (found := digest(file)) != known["sha256"]:
        what = "a file of the checkpoint has changed since it was written"
        raise InputError(what, where=file, found=f"SHA-256 {found}", expected=known["sha256"])


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
