"""What a person sees of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["PlainReport", "Report", "TerminalReport", "make_report"]

Record = Mapping[str, Any]


class Report(Protocol):
    """Takes what happens, in the order in which it happens."""

    def start(self, step: int, steps: int) -> None:
        """The loop begins at `step`."""

    def step(self, record: Record) -> None:
        """A step was taken; the record is the line of metrics.jsonl."""

    def say(self, text: str = "") -> None:
        """Something else is to be said."""

    def stop(self) -> None:
        """The loop has ended."""


def describe(record: Record) -> str:
    """`loss 3.1416, lr 1.0e-03, 51.2k tok/s, mfu 34%`."""
    loss = "skipped" if "skipped" in record else f"loss {record['loss']:.4f}"
    parts = [loss, f"lr {record['lr']:.1e}"]
    parts.append(f"{record['tokens_per_second'] / 1e3:.1f}k tok/s")
    if record.get("mfu") is not None:
        parts.append(f"mfu {record['mfu']:.0%}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class PlainReport:
    """A line after the first step and every `every` seconds, for logs and pipes."""

    def __init__(self, console: Console, every: float = 5.0) -> None:
        self.console = console
        self.every = every
        self.first, self.steps = 0, 1
        self.began = self.last = self.shown = self.slowest = 0.0

    def start(self, step: int, steps: int) -> None:
        """Begin to count time."""
        self.first, self.steps = step, steps
        self.began = self.last = time.monotonic()
        self.shown = self.slowest = 0.0

    def step(self, record: Record) -> None:
        """Print the step if the last line is old enough."""
        now = time.monotonic()
        self.slowest, self.last = max(self.slowest, now - self.last), now
        if now - self.shown < self.every and record["step"] < self.steps:
            return
        self.shown = now
        eta = duration(self._typical(record["step"] - self.first) * (self.steps - record["step"]))
        self.say(f"step {record['step']}/{self.steps}: {describe(record)}, eta {eta}")

    def _typical(self, done: int) -> float:
        """Seconds of a step and what is around it, without the slowest one, which may have compiled."""
        passed = self.last - self.began
        return passed if done < 2 else (passed - self.slowest) / (done - 1)

    def say(self, text: str = "") -> None:
        """Print a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing is open."""


class TerminalReport:
    """A progress bar that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
        )
        self.progress = Progress(*columns, console=console, refresh_per_second=4)
        self.task: TaskID | None = None

    def start(self, step: int, steps: int) -> None:
        """Draw the bar."""
        self.task = self.progress.add_task("", total=steps, completed=step)
        self.progress.start()

    def step(self, record: Record) -> None:
        """Move the bar."""
        if self.task is not None:
            self.progress.update(self.task, completed=record["step"], description=describe(record))

    def say(self, text: str = "") -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self.progress.stop()


def make_report() -> Report:
    """The live line on a terminal, the plain one elsewhere."""
    console = Console()
    return TerminalReport(console) if console.is_terminal else PlainReport(console)
