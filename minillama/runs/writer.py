"""Asynchronous checkpoint writing: a step waits for the copy of the tensors, not for the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from minillama.runs.checkpoint import CheckpointCopy, WriteModel, prune, remove_parts, save_checkpoint, steps
from minillama.runs.report import Report


class CheckpointWriter:
    """Background thread that writes one checkpoint at a time; the next one waits for it.

    Args:
        folder: of all checkpoints.
        keep: number of newest checkpoints kept.
        write_model: writes a model folder from tensors into a path.
        report: told when a checkpoint could not be written. The run continues; the one before is intact.
        leads: whether this process removes old checkpoints; others of the same run write their part alone.
    """

    def __init__(self, folder: Path, keep: int, write_model: WriteModel, report: Report, leads: bool = True) -> None:
        self.leads, self.over = leads, threading.Event()
        self.folder, self.keep, self.write_model, self.report = folder, keep, write_model, report
        self.losses: dict[int, float] = {}
        """The objective's measure by step, lower is better; the checkpoint with the lowest is kept."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the lowest measure, of those that are on the disk."""
        there = [step for step in steps(self.folder) if step in self.losses]
        return min(there, key=lambda step: self.losses[step], default=None)

    def submit(self, take: Callable[[], CheckpointCopy]) -> None:
        """Take a snapshot and write it, after the one before. A failure of that one is reported here."""
        self.wait()
        snapshot = take()  # not before: two of them at once would cost the memory of two
        if snapshot.index >= snapshot.count:
            return
        # A daemon, so that a second Ctrl-C need not wait for the disk: a partial checkpoint stays invisible.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the last one.

        Raises:
            InputError: it could not be written.
        """
        self.wait(says=False)
        if self._failure is not None:
            raise self._failure
        self._prune()

    def wait(self, says: bool = True) -> None:
        """Wait for the last one, report that it could not be written, and continue."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if says and self._failure is not None:
                self.report.say(f"warning: {self._failure}\n  the run continues; the checkpoints before are unchanged")

    def _prune(self) -> None:
        if not self.leads:
            return
        try:
            prune(self.folder, self.keep, self.best)
        except OSError as error:
            self.report.say(f"warning: old checkpoints cannot be removed: {error}")

    def _write(self, snapshot: CheckpointCopy) -> None:
        self._failure = None
        try:
            save_checkpoint(self.folder, snapshot, self.write_model, self.over)
            self._prune()
        except BaseException as error:  # raised again by finish, or reported by submit
            if self.leads:  # what others wrote of it; it would fill a full disk further
                remove_parts(self.folder)
            self._failure = error.with_traceback(None)  # whose frames would keep the tensors
