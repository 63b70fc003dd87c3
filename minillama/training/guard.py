"""Loss-spike guard: skips steps with a NaN or infinite loss or gradient, or a loss far above the usual."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from minillama.errors import InputError
from minillama.runs.sections import GuardConfig


@dataclass
class Guard:
    """Loss-spike guard, asked before each optimizer step.

    Args:
        recent: losses of the last steps taken, at most `config.window`.
        in_a_row: consecutive skipped steps.
        skipped: all skipped steps.
    """

    config: GuardConfig
    recent: list[float] = field(default_factory=list)
    in_a_row: int = 0
    skipped: int = 0

    def judge(self, loss: float, norm: float) -> str | None:
        """Reason to skip the step, None to take it.

        A loss is a spike when it is more than `sigma` standard deviations above the mean of the last
        `window` ones, of which there must be at least 10.
        """
        reason = self._reason(loss, norm)
        if reason is None:
            self.in_a_row = 0
            self.recent = [*self.recent, loss][-self.config.window :]
        else:
            self.in_a_row += 1
            self.skipped += 1
        return reason

    def _reason(self, loss: float, norm: float) -> str | None:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"{name} {value}"
        if not self.config.spike_sigma or len(self.recent) < 10:
            return None
        mean = math.fsum(self.recent) / len(self.recent)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self.recent) / len(self.recent))
        limit = mean + self.config.spike_sigma * deviation
        if loss <= limit:
            return None
        return f"loss {loss:.4f} above {mean:.4f} + {self.config.spike_sigma:g} x {deviation:.4f}"

    @property
    def is_over(self) -> bool:
        """Whether the allowed number of consecutive steps was skipped."""
        return self.in_a_row >= self.config.max_in_a_row

    def error(self, step: int) -> InputError:
        """Error that ends the run."""
        return InputError(
            f"{self.in_a_row} steps in a row were skipped, the last one step {step}",
            where="guard.max_in_a_row",
            found=f"{self.skipped} skipped in all; metrics.jsonl says why, and which rows they read",
            fix="lower optim.lr and go on with --resume, or look at the text that is named",
        )

    def state(self) -> dict[str, Any]:
        """JSON state for `restore`."""
        return {"recent": list(self.recent), "in_a_row": self.in_a_row, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore that state. A run that stopped for its skips may try as many again."""
        self.recent, self.skipped = list(state["recent"]), state["skipped"]
        self.in_a_row = state["in_a_row"] if state["in_a_row"] < self.config.max_in_a_row else 0
