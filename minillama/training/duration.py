"""Duration of a run in minutes: the number of steps follows from the speed of the first ones."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from statistics import median

from minillama.runs.config import RunConfig

TIMED = 10  # steps
VALIDATIONS = 4  # which are still to come when the steps are counted
END = 0.03  # of the minutes: the last checkpoint, the model's folder, the plot


@dataclass
class Duration:
    """Time of a run and of its steps.

    Attributes:
        began: when, by `time.perf_counter`.
        seconds: of each step since its speed last changed, the first of which may be another's.
        validation: seconds of the last validation.
    """

    began: float = field(default_factory=time.perf_counter)
    seconds: list[float] = field(default_factory=list)
    validation: float = 0.0

    @property
    def typical(self) -> float:
        """Median seconds of a step."""
        return median(self.seconds)

    def left(self, config: RunConfig, step: int) -> float:
        """Seconds of steps that are left to a run that has taken so many."""
        if not config.train.minutes:
            return self.typical * (config.train.steps - step)
        budget = 60 * config.train.minutes
        return max(0.0, budget * (1 - END) - (time.perf_counter() - self.began) - VALIDATIONS * self.validation)

    def resolved(self, config: RunConfig, step: int) -> RunConfig:
        """Configuration with the steps that fit into its minutes, one more at least."""
        steps = step + max(1, round(self.left(config, step) / self.typical))
        return replace(config, train=replace(config.train, steps=steps, minutes=0.0))
