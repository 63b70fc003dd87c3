"""Progress with the time left, on standard error: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

KNOWN = 0.01  # share done below which the first batches, with their compilation, say little of the rest


class Progress:
    """Progress towards a total, in a `with` block.

    Args:
        name: of what is done.
        total: in any unit that time is proportional to.
    """

    def __init__(self, name: str, total: int, every: float = 10.0) -> None:
        self.name, self.total, self.every = name, total, every
        self.done, self.began = 0, time.monotonic()
        self.shown = self.began
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        self.bar = Bar(*columns, console=console, transient=True) if console.is_terminal else None
        if self.bar is not None:
            self.task = self.bar.add_task(name, total=total)

    def advance(self, amount: int, name: str = "") -> None:
        """Add what has been done."""
        self.done, self.name = self.done + amount, name or self.name
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, total=self.total, description=self.name)
        now = time.monotonic()
        if self.bar is None and now - self.shown >= self.every:
            self.shown, share = now, self.done / self.total
            seconds = round((now - self.began) * (1 - share) / share) if share >= KNOWN else 0
            left = f"{seconds // 60}:{seconds % 60:02} left" if share >= KNOWN else "time left not known yet"
            print(f"{self.name}: {share:.0%}, {left}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
