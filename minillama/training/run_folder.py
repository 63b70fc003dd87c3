"""The folder of a run: where it is, whose it is, what lies in it.

OUT/config.toml, OUT/metrics.jsonl, OUT/checkpoints/step-N/, OUT/model/.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from minillama.errors import InputError

__all__ = ["RunFolder", "choose_folder"]

CONTENTS = ("config.toml", "metrics.jsonl", "loss.png", "checkpoints", "model")


def choose_folder(name: str, out: str | None, runs: Path = Path("runs")) -> Path:
    """`out`, or the first of runs/NAME, runs/NAME-2, runs/NAME-3 ... that is not there yet."""
    if out is not None:
        return Path(out)
    number = 1
    while (path := runs / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


class RunFolder:
    """An output folder that was made, found writable and locked for this process.

    Args:
        path: the folder.
        resume: it may hold a run, which goes on.
        overwrite: it may hold a run, which is removed.

    Raises:
        InputError: it holds a run and neither was asked for; it cannot be written; another process
            trains in it.
    """

    def __init__(self, path: Path, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        if self.holds_run() and not (resume or overwrite):
            raise InputError(
                "the output folder holds a run already",
                where=path,
                fix="add --resume to go on with it, or --overwrite to replace it, or choose another --out",
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".write-test"
            probe.write_bytes(b"")
            probe.unlink()
            self._lock = self._take_lock()
        except OSError as error:
            raise InputError(
                "the output folder cannot be written",
                where=path,
                found=error.strerror or error,
                fix="choose another with --out",
            ) from error
        if overwrite and not resume:
            self._clear()

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The final model folder."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return any((self.path / name).exists() for name in CONTENTS)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be cut
                records.append(json.loads(line))
        return records

    def rewind_metrics(self, step: int) -> None:
        """Drop what was recorded after `step`, for a run that goes on from there."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        self.metrics.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def _take_lock(self) -> IO[str] | None:
        """An flock that ends with the process, however it ends. Without flock (Windows) there is none."""
        try:
            import fcntl
        except ImportError:
            return None
        file = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise InputError(
                "another process is training in the output folder",
                where=self.path,
                found=f"process {owner}",
                fix="wait for it, stop it, or choose another --out",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _clear(self) -> None:
        for name in CONTENTS:
            target = self.path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
