"""Straggler detection: the process of a run that keeps the others waiting."""

from __future__ import annotations

import socket
from statistics import median_low

from minillama.training.ranks import Ranks

SLOW = 1.2  # times the median from which on a process is named


class Pace:
    """Mean seconds of this process's forward and backward passes, compared with those of the others.

    Processes of one sharded or tensor-parallel model wait for one another within a pass, and have the same.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.seconds, self.steps = ranks, 0.0, 0

    def add(self, seconds: float) -> None:
        """Count the passes of a step."""
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1

    def slowest(self) -> str:
        """Line that names the slowest process since the last call, empty if it is as fast as others; all must ask."""
        if self.ranks.processes == 1 or not self.steps:
            return ""
        found = self.ranks.collect((self.seconds / self.steps, socket.gethostname()))
        self.seconds, self.steps = 0.0, 0
        typical, slow = median_low([seconds for seconds, _ in found]), max(found)
        if slow[0] < SLOW * typical:
            return ""
        name = f"process {found.index(slow)} of {len(found)} on {slow[1]}"
        return f"the others wait for {name}: {slow[0]:.3g} s per step, where the median is {typical:.3g} s"
