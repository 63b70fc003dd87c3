"""IsoFLOP sweep: tiny runs of several sizes at each of several budgets, one after the other."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.files import parsing, read_json, read_text, regular, replace_text
from minillama.runs.config import RunConfig, to_table
from minillama.runs.record import RecordedRun
from minillama.scaling.fit import Fit
from minillama.scaling.laws import Law, interval
from minillama.scaling.points import read_runs
from minillama.scaling.shapes import batch_tokens, nearest, shapes, size

RATIO = 1.6  # between the sizes
EXTRA = 6  # sizes added at most where the least loss is at the edge

Train = Callable[[Path, Path], int]


def train_process(config: Path, folder: Path) -> int:
    """Exit status of `minillama train CONFIG --out FOLDER`, resumed if it was stopped; its output is in FOLDER.log."""
    command = [sys.executable, "-m", "minillama", "train", str(config), "--out", str(folder)]
    command += ["--resume"] if (folder / "config.toml").exists() else []
    # Ctrl-C reaches the process by itself: it saves and ends, and so does the sweep
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        with open(folder.with_name(f"{folder.name}.log"), "a", encoding="utf-8", opener=regular) as log:
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)


class Sweep:
    """Runs of a sweep's folder. The order follows from the finished ones, so that it goes on where it was stopped.

    Args:
        base: tokenizer, data, context, head width and optimizer of every run.
        folder: of all runs.
        budgets: FLOPs, ascending.
        sizes: per budget, at first. Where the smallest or largest is the best, up to six more are added beyond.
        minutes: no run is started that would end later; 0: no limit.
        train: trains a configuration in a folder, and returns its exit status.
        say: told of each run.
    """

    def __init__(
        self,
        base: RunConfig,
        folder: Path,
        budgets: Sequence[float],
        sizes: int = 5,
        minutes: float = 0.0,
        train: Train = train_process,
        say: Callable[[str], None] = print,
    ) -> None:
        if len(budgets) < 2 or budgets[0] <= 0 or any(b <= a for a, b in pairwise(budgets)):
            raise InputError("budgets must rise", where="--budgets", found=list(budgets), expected="two or more")
        self.rungs = ladder(base.model)
        if not 3 <= sizes <= len(self.rungs):
            expected = f"3, for a parabola, to {len(self.rungs)}"
            raise InputError("no such number of sizes", where="--sizes", found=sizes, expected=expected)
        self.base, self.folder, self.budgets, self.sizes = base, folder, budgets, sizes
        self.minutes, self.train, self.say = minutes, train, say
        self.began, self.flops, self.seconds = time.monotonic(), 0.0, 0.0

    def run(self) -> bool:
        """Run what is left; whether all is finished."""
        expected = Law.load("epoch").optimum(self.budgets[0])[0]
        center = min(range(len(self.rungs)), key=lambda i: abs(math.log(size(self.rungs[i]) / expected)))
        for i, flops in enumerate(self.budgets):
            if i:  # N_opt ~ C^0.5
                center += round(math.log(flops / self.budgets[i - 1]) / 2 / math.log(RATIO))
            first = min(max(center - self.sizes // 2, 0), len(self.rungs) - self.sizes)
            losses: dict[int, float] = {}
            wanted = list(range(first, first + self.sizes))
            while wanted:
                for index in wanted:
                    loss = self._loss(run_config(self.base, self.rungs[index], flops))
                    if loss is None:
                        return False
                    losses[index] = loss
                wanted = self._beyond(losses)
            center = min(losses, key=lambda index: losses[index])
        return True

    def _beyond(self, losses: dict[int, float]) -> list[int]:
        """The next size where the best one is at the edge."""
        best = min(losses, key=lambda index: losses[index])
        beyond = {min(losses): best - 1, max(losses): best + 1}.get(best, -1)
        return [beyond] if len(losses) < self.sizes + EXTRA and 0 <= beyond < len(self.rungs) else []

    def _loss(self, config: RunConfig) -> float | None:
        """Held-out loss of a run, trained unless it is finished; None if it was stopped or would take too long."""
        path = self.folder / config.name
        if not is_finished(path):
            rate = self.seconds / self.flops if self.flops else 0.0
            minutes = (time.monotonic() - self.began + rate * _flops(config)) / 60
            if self.minutes and minutes > self.minutes:
                self.say(f"{config.name} was not started: it would end after {minutes:.3g} minutes")
                return None
        if not self.finish(config, path):
            return None
        (point,) = read_runs([path]).points
        self.flops += point.flops
        self.seconds += RecordedRun.open(path).records[-1]["seconds"]
        self.say(f"{config.name}: D {point.tokens:.3g}, loss {point.loss:.4f}, {point.measures[1]:.4f} bits per byte")
        return point.loss

    def finish(self, config: RunConfig, path: Path) -> bool:
        """Train a run unless it is finished; whether it is then.

        Raises:
            InputError: it was started with other settings.
        """
        written, text = path.with_name(f"{path.name}.toml"), tomli_w.dumps(to_table(config))
        if written.exists() and read_text(written) != text:
            fix = "choose another --out, or remove the run"
            raise InputError("this run of the sweep was started with other settings", where=written, fix=fix)
        if is_finished(path):
            return True
        replace_text(written, text)
        status = self.train(written, path)
        if status or not is_finished(path):
            self.say(f"{config.name} was stopped, status {status}; see {path}.log")
        return is_finished(path)


def ladder(base: ModelConfig) -> list[ModelConfig]:
    """Sizes of a sweep: shapes by one rule with heads of the base's width, each about 1.6 times the one before."""
    rungs: list[ModelConfig] = []
    for model in shapes(base, base.head_dim):
        if not rungs or size(model) >= RATIO**0.75 * size(rungs[-1]):
            rungs.append(model)
    return rungs


def run_config(base: RunConfig, model: ModelConfig, flops: float) -> RunConfig:
    """Run of a shape whose steps spend a budget: batch by its rule, one validation at the end.

    Args:
        base: the rest; under muP its learning rate is right for every width.
        model: shape.
        flops: C, counted exactly.
    """
    context = base.context
    rows = max(1, round(batch_tokens(flops) / context))
    steps = max(1, round(flops / (model.flops_per_token(context) * rows * context)))
    return replace(
        base,
        name=f"C{flops:.3g}-N{size(model)}".replace("+", ""),
        model=model,
        train=replace(base.train, steps=steps, minutes=0.0, batch_size=rows),
        optim=replace(base.optim, warmup_steps=max(1, steps // 20)),
        validate=replace(base.validate, every=steps),
        checkpoint=replace(base.checkpoint, every=steps, keep=1),
    )


def is_finished(path: Path) -> bool:
    """Whether a folder holds a finished run."""
    return (path / "config.toml").exists() and RecordedRun.open(path).is_finished


def predict(sweep: Sweep, fits: dict[int, Fit]) -> tuple[RunConfig, dict[str, Any]]:
    """Run at four times the largest budget, and its predicted loss.

    N_opt is that of the IsoFLOP parabolas, or of the parametric law where there is none. FOLDER/next/prediction.json
    holds what was predicted first, so that it was predicted before the run.

    Returns:
        The run, and N, D, C, loss by the parametric law and its 95 % interval, and the least loss at C by the power law
        through the minima of the parabolas, None where there are none.

    Raises:
        InputError: there is no parametric fit.
    """
    law = fits[3].law if 3 in fits else None
    if law is None:
        raise InputError("there is no parametric fit to predict a loss with", fix="add budgets or sizes")
    flops, head = 4 * sweep.budgets[-1], sweep.base.model.head_dim
    path = sweep.folder / "next" / "prediction.json"
    is_made = path.exists()
    made = read_json(path) if is_made else {}
    with parsing(path):
        params = float(made["params"]) if is_made else (fits.get(2) or fits[3]).params(flops)
    config = replace(run_config(sweep.base, nearest(params, sweep.base.model, head), flops), name="run")
    if not is_made:
        count, tokens = size(config.model), float(config.train.steps * config.train.batch_size * config.context)
        made = {"params": count, "tokens": tokens, "flops": _flops(config), "loss": law.loss(count, tokens)}
        least = fits[2].loss if 2 in fits else None
        made["least_loss"] = least and least(made["flops"])
        made["interval"] = interval(law, lambda near: near.loss(count, tokens), law.residual)
        replace_text(path, json.dumps(made, indent=2) + "\n")
    return config, made


def _flops(config: RunConfig) -> float:
    tokens = config.train.steps * config.train.batch_size * config.context
    return tokens * config.model.flops_per_token(config.context)
