"""Progress report of a run: progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Mapping
from itertools import groupby
from statistics import median
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

Record = Mapping[str, Any]
FEEDBACK = {  # of answers that are rewarded: KL in nats per answer, entropy per token, length in tokens
    "reward": "reward {:.3f}",
    "kl": "kl {:.2f}",
    "entropy": "entropy {:.2f}",
    "clipped": "clipped {:.1%}",
    "answer_length": "length {:.1f}",
    "ended": "ended {:.0%}",
}
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # paths and samples may act on a terminal


def quoted(text: str) -> str:
    """Sample with a bar in front of its lines; three empty ones or more in a row are counted."""
    lines: list[str] = []
    for is_empty, group in groupby(text.strip().split("\n"), lambda line: not line.strip()):
        same = list(group)
        lines += [f"({len(same)} empty lines)"] if is_empty and len(same) > 2 else same
    return "\n".join(f"  | {line}" for line in lines)


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


class SilentReport:
    """No report, of processes beside the one that reports."""

    def start(self, step: int, steps: int) -> None: ...

    def step(self, record: Record) -> None: ...

    def say(self, text: str = "") -> None: ...

    def stop(self) -> None: ...


class Pace:
    """Estimate of seconds per step: the median of the last steps, and a share of recent extra time.

    A step that took over three times the median compiled or validated. Its excess counts for all steps alike,
    but for the longest, which happens once.
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=9)
        self.excess: deque[float] = deque(maxlen=200)

    def add(self, seconds: float) -> None:
        """Add the time since the step before."""
        self.recent.append(seconds)
        typical = median(self.recent)
        self.excess.append(seconds - typical if seconds > 3 * typical else 0.0)

    def left(self, steps: int) -> str:
        """Estimated duration of so many steps, as `1:02:03` or `2:03`."""
        excess = (sum(self.excess) - max(self.excess)) / len(self.excess)
        minutes, seconds = divmod(int((median(self.recent) + excess) * steps), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class PlainReport:
    """Plain lines after the first step and every `every` seconds, for logs and pipes."""

    def __init__(self, console: Console, every: float = 5.0) -> None:
        self.console, self.every = console, every

    def start(self, step: int, steps: int) -> None:
        self.steps, self.last, self.shown, self.pace = steps, time.monotonic(), 0.0, Pace()

    def status(self, record: Record) -> str:
        """Metrics of a step that was just taken: `loss 3.1416, lr 1.0e-03, 51.2k tok/s, mfu 34%, eta 1:02`."""
        before, self.last = self.last, time.monotonic()
        self.pace.add(self.last - before)
        loss = "skipped" if "skipped" in record else f"loss {record['loss']:.4f}"
        mfu = f", mfu {record['mfu']:.0%}" if record.get("mfu") is not None else ""
        speed, left = record["tokens_per_second"] / 1e3, self.pace.left(self.steps - record["step"])
        feedback = "".join(
            f", {form.format(record[name])}" for name, form in FEEDBACK.items() if record.get(name) is not None
        )
        return f"{loss}{feedback}, lr {record['lr']:.1e}, {speed:.1f}k tok/s{mfu}, eta {left}"

    def step(self, record: Record) -> None:
        status = self.status(record)
        if self.last - self.shown >= self.every or record["step"] >= self.steps:
            self.shown = self.last
            self.say(f"step {record['step']}/{self.steps}: {status}")

    def say(self, text: str = "") -> None:
        text = CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing is open."""


class TerminalReport(PlainReport):
    """Progress bar that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.description}")
        self.progress = Progress(*columns, console=console, refresh_per_second=4)

    def start(self, step: int, steps: int) -> None:
        super().start(step, steps)
        self.task = self.progress.add_task("", total=steps, completed=step)
        self.progress.start()

    def step(self, record: Record) -> None:
        self.progress.update(self.task, completed=record["step"], description=self.status(record))

    def stop(self) -> None:
        self.progress.stop()


def make_report() -> Report:
    """Progress bar on a terminal, plain lines elsewhere."""
    console = Console()
    return TerminalReport(console) if console.is_terminal else PlainReport(console)
