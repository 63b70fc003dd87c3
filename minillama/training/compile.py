"""Compilation in a run: the blocks where it pays back within the run, the C++ kernels once per machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minillama.device import compiler_missing
from minillama.model import Decoder
from minillama.native import attention, softmax, swiglu
from minillama.native.build import CannotBuild, can_build
from minillama.runs.report import Report

# seconds of a cold compilation of one block, forward and backward, and the share of a step that it saves. On the
# CPU they are the conservative end of measurements (benchmarks/README.md); for the others they are estimates.
COST = 12.0
SAVING = {"cpu": 0.04, "cuda": 0.2, "mps": 0.1}
SAVING_BFLOAT16 = {"cpu": 0.15}
TIMED = 10


class Compiler:
    """Compilation policy: times eager steps, compiles the blocks if the rest of the run is long enough.

    Args:
        mode: `true` compiles before the first step, `false` never, `auto` as above.
        model: its blocks are compiled in place.
    """

    def __init__(self, mode: str, model: Decoder, report: Report) -> None:
        self.model, self.report = model, report
        self.waiting = mode == "auto"
        self.seconds: list[float] = []
        if mode == "true":
            self._compile()

    def after_step(self, seconds: float, steps_left: int) -> None:
        """Record the time of a step; the first ones decide."""
        if not self.waiting:
            return
        self.seconds.append(seconds)
        if len(self.seconds) < TIMED:
            return
        self.waiting = False
        typical, device = sorted(self.seconds)[len(self.seconds) // 2], self.model.device.type
        saving = SAVING_BFLOAT16.get(device, SAVING[device]) if self.model.dtype == torch.bfloat16 else SAVING[device]
        if typical * steps_left * saving > COST:
            self._compile()

    def _compile(self) -> None:
        missing = compiler_missing(self.model.device)
        if missing is not None:
            self.report.say(f"not compiling: {missing}; the run goes on without")
            return
        self.report.say("compiling the blocks; the next step takes longer")
        self.model.compile_blocks()


def use_native_kernels(model: Decoder, say: Callable[[str], None]) -> None:
    """Native C++ kernels for training in bfloat16 on a CPU, where a compiler is there; `say` is told why it fails."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not can_build():
        return
    parts = (attention, "attention"), (swiglu, "the feed-forward layers"), (softmax, "the loss")
    for part, name in parts:
        if part.KERNEL.unsupported() is not None:
            continue
        try:
            part.KERNEL.use(model, say)
        except CannotBuild as error:
            say(f"C++ for {name} was not compiled, the run goes on without: {error}")
