"""When to compile: never at the start, and only where it pays back within the run."""

from __future__ import annotations

from minillama.device import compiler_missing
from minillama.model import Decoder
from minillama.training.report import Report

__all__ = ["Compiler"]

# seconds of a cold compilation of one block, forward and backward, and the share of a step that it saves. On the
# CPU they are the careful end of what was measured (benchmarks/README.md); for the others they are estimates.
COST = 12.0
SAVING = {"cpu": 0.04, "cuda": 0.2, "mps": 0.1}
WATCHED = 10


class Compiler:
    """Watches eager steps and compiles the model's blocks when the rest of the run is long enough.

    Args:
        mode: `true` compiles before the first step, `false` never, `auto` as above.
        model: its blocks are compiled in place.
        report: told what happens, once.
    """

    def __init__(self, mode: str, model: Decoder, report: Report) -> None:
        self.model, self.report = model, report
        self.waiting = mode == "auto"
        self.seconds: list[float] = []
        if mode == "true":
            self._compile()

    def after_step(self, seconds: float, steps_left: int) -> None:
        """Take the time of a step; the first ones decide."""
        if not self.waiting:
            return
        self.seconds.append(seconds)
        if len(self.seconds) < WATCHED:
            return
        self.waiting = False
        typical = sorted(self.seconds)[len(self.seconds) // 2]
        if typical * steps_left * SAVING[self.model.device.type] > COST:
            self._compile()

    def _compile(self) -> None:
        missing = compiler_missing(self.model.device)
        if missing is not None:
            self.report.say(f"not compiling: {missing}; the run goes on without")
            return
        self.report.say("compiling the blocks; the next step takes longer")
        self.model.compile_blocks()
