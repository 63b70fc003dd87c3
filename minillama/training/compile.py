"""Compilation in a run: the blocks where it pays back within the run, the C++ kernels once per machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median

import torch
from torch import nn

from minillama.device import compiler_missing
from minillama.errors import InputError
from minillama.files import cache_folder, read_json, replace_text
from minillama.model import Decoder
from minillama.native import attention, softmax, swiglu
from minillama.native.build import CannotBuild, can_build
from minillama.runs.report import Report
from minillama.training.duration import TIMED, Duration

FILE = "compilation.json"
KERNELS = {  # of a training step by dtype
    torch.bfloat16: (
        (attention.KERNEL, "attention"),
        (swiglu.KERNEL, "the feed-forward layers"),
        (softmax.KERNEL, "the loss"),
    ),
    torch.float32: ((attention.FLOAT, "attention"),),
}
TRIAL = 1800.0  # seconds that a run must have left to try what this machine has not measured


class Compiler:
    """Compilation policy: times eager steps, compiles the blocks if that pays back within the rest of the run.

    What a compilation cost and what it saved of a step is measured, and kept in the cache folder per device, dtype and
    version of torch; the next run is decided by the last one.

    Args:
        mode: `true` compiles before the first step, `false` never, `auto` as above.
        model: its blocks are compiled in place.
        report: is told what was decided.
    """

    def __init__(self, mode: str, model: Decoder, report: Report) -> None:
        self.model, self.report = model, report
        self.waiting, self.eager = mode == "auto", 0.0  # seconds of an eager step, while compiled ones are timed
        self.key = f"{model.device.type} {str(model.dtype).removeprefix('torch.')} torch {torch.__version__}"
        if mode == "true":
            self._compile("")

    @property
    def settled(self) -> bool:
        """Whether the speed of the steps to come is that of the last ones."""
        return not self.waiting and not self.eager

    def after_step(self, duration: Duration, left: float) -> None:
        """Decide, once enough steps were timed.

        Args:
            duration: of the steps so far.
            left: seconds of steps that are left.
        """
        if len(duration.seconds) < TIMED or self.settled:
            return
        if self.eager:
            self._remember(duration.seconds)
            return
        self.waiting = False
        known = self._known()
        if known is None:
            if left < TRIAL:
                self.report.say("not compiling: not measured on this machine, and the run is too short to try it")
            else:
                self._compile(", to measure what it saves")
        elif left * known["saved"] > known["seconds"]:
            self._compile(f": it took {known['seconds']:.0f} s here and saved {known['saved']:.0%} of a step")
        else:
            cost, gain = known["seconds"], max(0.0, left * known["saved"])
            self.report.say(f"not compiling: it took {cost:.0f} s here, and would save {gain:.0f} s of this run")
        if self.eager:
            self.eager = duration.typical
            duration.seconds.clear()

    def _compile(self, reason: str) -> None:
        missing = compiler_missing(self.model.device)
        if missing is not None:
            self.report.say(f"not compiling: {missing}; the run goes on without")
            return
        self.report.say(f"compiling the blocks{reason}; the next step takes longer")
        self.model.compile_blocks()
        self.eager = 1.0 if reason else 0.0

    def _remember(self, seconds: list[float]) -> None:
        """Keep what the first compiled step took, and the others saved."""
        first, typical = seconds[0], median(seconds[1:])
        found = {"seconds": max(0.0, first - typical), "saved": 1 - typical / self.eager}
        self.eager = 0.0
        del seconds[0]
        with suppress(InputError, RuntimeError):  # no home, or no room in it
            replace_text(cache_folder() / FILE, json.dumps(self._file() | {self.key: found}, indent=2) + "\n")

    def _known(self) -> dict[str, float] | None:
        found = self._file().get(self.key)
        is_known = isinstance(found, dict) and all(isinstance(found.get(k), float) for k in ("seconds", "saved"))
        return found if is_known else None

    @staticmethod
    def _file() -> dict[str, dict[str, float]]:
        with suppress(InputError, RuntimeError):
            return read_json(cache_folder() / FILE)
        return {}


def use_native_kernels(models: Sequence[nn.Module], working: Decoder, say: Callable[[str], None]) -> None:
    """Native C++ kernels for training on a CPU, where a compiler is there.

    Args:
        models: what a step computes with.
        working: the trained one, which has their type and device.
        say: is told what is compiled, and why it fails.
    """
    if working.device.type != "cpu" or not can_build():
        return
    for kernel, name in KERNELS.get(working.dtype, ()):
        if kernel.unsupported() is not None:
            continue
        try:
            for model in models:
                kernel.use(model, say)
        except CannotBuild as error:
            say(f"C++ for {name} was not compiled, the run goes on without: {error}")
