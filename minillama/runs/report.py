"""Progress report of a run: progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

Record = Mapping[str, Any]


class Report(Protocol):
    """Receiver of the events of a run, in order."""

    def start(self, step: int, steps: int) -> None:
        """The loop begins at `step`."""

    def step(self, record: Record) -> None:
        """A step was taken; the record is the line of metrics.jsonl."""

    def say(self, text: str = "") -> None:
        """Print a message."""

    def stop(self) -> None:
        """The loop has ended."""


def describe(record: Record) -> str:
    """Metrics of a step: `loss 3.1416, lr 1.0e-03, 51.2k tok/s, mfu 34%`."""
    loss = "skipped" if "skipped" in record else f"loss {record['loss']:.4f}"
    parts = [loss, f"lr {record['lr']:.1e}", f"{record['tokens_per_second'] / 1e3:.1f}k tok/s"]
    if record.get("mfu") is not None:
        parts.append(f"mfu {record['mfu']:.0%}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Duration as `1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Pace:
    """Estimate of seconds per step: the median of the last steps, and a share of recent extra time.

    A step that took over three times the median compiled or validated. Its excess counts for all steps alike,
    but for the longest, which happens once.
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=9)
        self.beyond: deque[float] = deque(maxlen=200)

    def add(self, seconds: float) -> None:
        """Add the time since the step before."""
        self.recent.append(seconds)
        typical = median(self.recent)
        self.beyond.append(seconds - typical if seconds > 3 * typical else 0.0)

    def left(self, steps: int) -> str:
        """Estimated duration of so many steps, formatted."""
        beyond = (sum(self.beyond) - max(self.beyond)) / len(self.beyond)
        return duration((median(self.recent) + beyond) * steps)


class PlainReport:
    """Plain lines after the first step and every `every` seconds, for logs and pipes."""

    def __init__(self, console: Console, every: float = 5.0) -> None:
        self.console, self.every = console, every
        self.steps, self.last, self.shown, self.pace = 1, 0.0, 0.0, Pace()

    def start(self, step: int, steps: int) -> None:
        """Start the clock."""
        self.steps, self.last, self.shown, self.pace = steps, time.monotonic(), 0.0, Pace()

    def status(self, record: Record) -> str:
        """Metrics of a step that was just taken, and the time left."""
        before, self.last = self.last, time.monotonic()
        self.pace.add(self.last - before)
        return f"{describe(record)}, eta {self.pace.left(self.steps - record['step'])}"

    def step(self, record: Record) -> None:
        """Print the step if the last line is old enough."""
        status = self.status(record)
        if self.last - self.shown >= self.every or record["step"] >= self.steps:
            self.shown = self.last
            self.say(f"step {record['step']}/{self.steps}: {status}")

    def say(self, text: str = "") -> None:
        """Print a line, above a progress bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing is open."""


class TerminalReport(PlainReport):
    """Progress bar that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        description = TextColumn("{task.description}")
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), description
        self.progress = Progress(*columns, console=console, refresh_per_second=4)

    def start(self, step: int, steps: int) -> None:
        """Draw the bar."""
        super().start(step, steps)
        self.task = self.progress.add_task("", total=steps, completed=step)
        self.progress.start()

    def step(self, record: Record) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=record["step"], description=self.status(record))

    def stop(self) -> None:
        """Leave the bar as it is."""
        self.progress.stop()


def make_report() -> Report:
    """Progress bar on a terminal, plain lines elsewhere."""
    console = Console()
    return TerminalReport(console) if console.is_terminal else PlainReport(console)
