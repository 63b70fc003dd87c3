"""Signal handling: the first Ctrl-C or SIGTERM saves the state and stops, the second stops at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from minillama.runs.report import Report

REPEATED = 2.0  # seconds


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; the run was saved. Like KeyboardInterrupt, it is no Exception that a library may catch."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Handler of SIGINT and SIGTERM: the first is noted and reported, so that a step is finished and saved."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.number: int | None = None
        self._stops_at_once = False
        self._at = 0.0

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals while the block runs. Only the main thread may; in another one nothing is handled."""
        before = {}
        with suppress(ValueError):
            before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """A block that changes nothing: the first signal ends it.

        Raises:
            Interrupted: a signal came in it.
        """
        self._stops_at_once = True
        try:
            self.check()
            yield
        finally:
            self._stops_at_once = False

    def check(self) -> None:
        """Stop here if a signal came.

        Raises:
            Interrupted: one did.
        """
        if self.number is not None:
            raise Interrupted(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now, self._at = time.monotonic(), self._at or time.monotonic()
        if self.number is not None and now - self._at < REPEATED and "TORCHELASTIC_RUN_ID" in os.environ:
            return  # the terminal's and torchrun's own are one
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        if self._stops_at_once:
            self.report.say("stopping")
            raise Interrupted(number)
        self.report.say("stopping after this step; once more stops at once")
