"""Checkpoints that are complete or absent.

`checkpoints/step-N/` is a model folder with three files more: optimizer.safetensors (tensors named
PARAMETER/NAME), run.json (step, tokens, seconds, data fingerprint) and manifest.json, the SHA-256 of every
other file. A checkpoint is written beside its place and renamed into it when all of it is on the disk.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minillama.atomic import replace_folder
from minillama.errors import InputError

__all__ = ["Checkpoint", "newest_checkpoint", "prune", "save_checkpoint"]

MANIFEST = "manifest.json"


class Checkpoint:
    """A complete checkpoint on disk.

    Raises:
        InputError: a file is missing or is not what the manifest says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for name, digest in json.loads((path / MANIFEST).read_text(encoding="utf-8")).items():
            file = path / name
            if not file.is_file() or _digest(file) != digest:
                raise InputError(
                    "a file of the checkpoint is missing or has changed since it was written",
                    where=file,
                    expected=f"SHA-256 {digest}",
                    fix=f"remove {path} to go on from the checkpoint before it",
                )
        self.run: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.run["step"])

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """What `optimizer_state` gave."""
        return load_file(self.path / "optimizer.safetensors")


def save_checkpoint(
    folder: Path,
    write_model: Callable[[Path], None],
    optimizer_tensors: Mapping[str, torch.Tensor],
    run: Mapping[str, Any],
) -> Path:
    """Write `folder/step-N`.

    Args:
        folder: of all checkpoints.
        write_model: writes the model folder's files into the path that it is given.
        optimizer_tensors: by name.
        run: JSON values, `step` among them.
    """

    def write(path: Path) -> None:
        write_model(path)
        tensors = {name: tensor.detach().contiguous() for name, tensor in optimizer_tensors.items()}
        save_file(tensors, path / "optimizer.safetensors")
        (path / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        digests = {file.name: _digest(file) for file in sorted(path.iterdir())}
        (path / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")

    return replace_folder(folder / f"step-{run['step']}", write)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The complete checkpoint with the most steps, verified; None when there is none."""
    numbered = _by_step(folder)
    return Checkpoint(numbered[-1]) if numbered else None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for path in _by_step(folder)[:-keep]:
        shutil.rmtree(path)


def _by_step(folder: Path) -> list[Path]:
    paths = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / MANIFEST).is_file()]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
