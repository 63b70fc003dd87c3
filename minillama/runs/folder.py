"""Run folder: path, lock, metrics, provenance.

OUT/config.toml, OUT/metrics.jsonl, OUT/provenance.jsonl, OUT/checkpoints/step-N/, OUT/model/.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from minillama.errors import InputError
from minillama.files import free_name, reading, regular, remove, replace_text
from minillama.runs.log import MetricsLog

FOLDERS = ("checkpoints", "model", "value", "average", "tensorboard")
CONTENTS = ("config.toml", "metrics.jsonl", "provenance.jsonl", "loss.png", *FOLDERS)
LOCK = ".lock"


def check_name(name: str) -> None:
    """Refuse the name of a run whose folder would not be one in runs/."""
    is_plain = re.fullmatch(r"(?![.\s])[^/\\:]+", name) and name.isprintable()
    if not is_plain or len(name.encode()) > 200:  # of the 255 of a file system
        expected = "at most 200 bytes, without / \\ : and control characters, and no dot or space in front"
        raise InputError("this cannot be the name of a run", where="name", found=repr(name), expected=expected)


def choose_folder(name: str, out: str | None, runs: Path = Path("runs")) -> Path:
    """`out`, or the first of runs/NAME, runs/NAME-2, runs/NAME-3 ... that does not exist yet."""
    if out is not None:
        if not out.strip():
            raise InputError("the output folder has no name", where="--out", found=repr(out), fix="name one")
        return Path(out)
    return free_name(runs / name)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a JSONL file of a run; none where it does not exist. What is no record is left out."""
    if not path.exists():
        return []
    records = []
    with reading(path), open(path, "rb", opener=regular) as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):  # the last line of a killed run may be incomplete
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, each of a step."""
    return [record for record in read_lines(path) if type(record.get("step")) is int]


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a JSONL file of a run.

    Raises:
        InputError: the system refuses, for instance because the disk is full.
    """
    try:
        with open(path, "a+b", opener=regular) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            # after a line that a killed process left incomplete a new one begins
            file.write(b"\n" * (file.read(1) not in (b"", b"\n")) + json.dumps(record).encode() + b"\n")
    except OSError as error:
        fix = "free disk space, then continue with --resume"
        raise InputError("cannot write", where=path, found=error.strerror or error, fix=fix) from error


def lock_owner(path: Path) -> str | None:
    """Id of the process that trains in a folder, None where there is none (or the system has no flock)."""
    with contextlib.suppress(OSError), open(path / LOCK, encoding="utf-8", opener=regular) as file:
        return _lock(file, exclusive=False)
    return None


def _lock(file: IO[str], exclusive: bool) -> str | None:
    """Take an flock, which ends with the process, however it ends; the id of the process that has it already."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "unknown"
    return None


class RunFolder:
    """Output folder, created, found writable and locked for this process.

    Args:
        resume: it may hold a run, which is resumed.
        overwrite: it may hold a run, which is removed.
        leads: whether this process writes; others of the same run neither lock nor change anything.

    Raises:
        InputError: it holds a run and neither was asked for; it cannot be written; a file of it is a link or a pipe;
            another process trains in it.
    """

    def __init__(self, path: Path, resume: bool = False, overwrite: bool = False, leads: bool = True) -> None:
        self.path, self._replaces, self.leads = path, overwrite and not resume, leads
        self.config, self.metrics, self.starts = path / "config.toml", path / "metrics.jsonl", path / "provenance.jsonl"
        self.checkpoints, self.model = path / "checkpoints", path / "model"
        self.log: MetricsLog | None = None
        if not leads:
            return
        try:
            self._was_there = path.exists()
            if self.holds_run() and not (resume or overwrite):
                raise InputError(
                    "the output folder holds a run already",
                    where=path,
                    fix="add --resume to continue it, or --overwrite to replace it, or choose another --out",
                )
            path.mkdir(parents=True, exist_ok=True)
            self._refuse_others()
            tempfile.TemporaryFile(dir=path).close()
            self._lock = self._take_lock()
        except OSError as error:
            raise InputError(
                "the output folder cannot be written",
                where=path,
                found=error.strerror or error,
                fix="choose another with --out",
            ) from error

    def _refuse_others(self) -> None:
        """Refuse what is not a run's own: nothing is written through a link, nor into a pipe or a device."""
        for name in (LOCK,) if self._replaces else (LOCK, *CONTENTS):
            path, is_own = self.path / name, stat.S_ISDIR if name in FOLDERS else stat.S_ISREG
            if os.path.lexists(path) and not is_own(path.lstat().st_mode):
                expected = f"a {'folder' if name in FOLDERS else 'regular file'}, not a link"
                raise InputError("this is not a run's own", where=path, expected=expected, fix="remove it")

    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return any(os.path.lexists(self.path / name) for name in CONTENTS)

    def start(self, config: str, provenance: Mapping[str, Any]) -> None:
        """Record configuration and provenance of this start; what is replaced is removed now.

        An existing model has fewer steps than the run will have.
        """
        if not self.leads:
            return
        for target in [self.path / name for name in (CONTENTS if self._replaces else ["model"])]:
            remove(target)
        self.write_config(config)
        append_line(self.starts, provenance)

    def write_config(self, config: str) -> None:
        """Replace the configuration."""
        replace_text(self.config, config)

    def rewind_metrics(self, step: int) -> None:
        """Remove the records after `step`, for a run that is resumed there."""
        if not self.leads:
            return
        kept = [record for record in read_metrics(self.metrics) if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        replace_text(self.metrics, text)

    def record(self, record: Mapping[str, Any]) -> None:
        """Append a step's line to metrics.jsonl, and log it.

        Raises:
            InputError: as `append_line`.
        """
        if self.leads:
            append_line(self.metrics, record)
            if self.log is not None:
                self.log.add(record)

    def _take_lock(self) -> IO[str]:
        file = open(self.path / LOCK, "a+", encoding="utf-8", opener=regular)  # noqa: SIM115 - held while the run lasts
        owner = _lock(file, exclusive=True)
        if owner is not None:
            file.close()
            raise InputError(
                "another process is training in the output folder",
                where=self.path,
                found=f"process {owner}",
                fix="wait for it, stop it, or choose another --out",
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def close(self) -> None:
        """Release the lock. A folder created for a run that never began is removed, too."""
        if not self.leads:
            return
        if self.log is not None:
            self.log.close()
        if not self._was_there and not self.holds_run():
            with contextlib.suppress(OSError):
                if os.name == "nt":  # where no open file can be removed
                    self._lock.close()
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()
        self._lock.close()
