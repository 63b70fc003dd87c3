"""Training loop. Every step is a pure function of the parameters, the optimizer's state, seed and step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from minillama.device import peak_flops
from minillama.files import replace_folder
from minillama.formats import hf
from minillama.inference.generate import generate
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.runs import memory
from minillama.runs.checkpoint import Checkpoint
from minillama.runs.config import RunConfig, Stage
from minillama.runs.folder import RunFolder
from minillama.runs.report import Report
from minillama.runs.signals import Interrupted, Signals
from minillama.runs.writer import CheckpointCopy, CheckpointWriter
from minillama.tokenizer import Tokenizer
from minillama.training import trainable
from minillama.training.compile import Compiler, use_native_kernels
from minillama.training.gradients import accumulate, clip, is_finite
from minillama.training.guard import Guard
from minillama.training.objectives import MODEL, Batch, Objective
from minillama.training.optim.groups import change_settings, make_optimizers
from minillama.training.optim.schedule import learning_rate
from minillama.training.precision import choose_precision
from minillama.training.probes import Probes
from minillama.training.ranks import Ranks
from minillama.training.state import TrainingState

PEAK_EVERY = 50  # steps between two measurements of the peak, at least
NAMED = 8  # rows of a skipped batch whose sources are reported


class Trainer:
    """Training loop of a model in a run folder.

    Args:
        config: the run.
        dtype: of the forward and backward passes.
        objective: the loss, its data and its models, on their device.
        tokenizer: saved beside every model.
        folder: where everything is written.
        report: where everything is printed.
        checkpoint: to resume from; None starts at step 0.

    Raises:
        InputError: the checkpoint was made with other data, or beside other frozen models.
    """

    def __init__(
        self,
        config: RunConfig,
        dtype: torch.dtype,
        objective: Objective,
        tokenizer: Tokenizer,
        folder: RunFolder,
        report: Report,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config, self.dtype, self.objective, self.tokenizer = config, dtype, objective, tokenizer
        self.folder, self.report = folder, report
        self.masters, self.ranks = dict(objective.models), Ranks.current()
        self.model = model = cast(Decoder, self.masters[MODEL])
        self.peak, self.next_peak = peak_flops(model.device, dtype), 0
        self.optimizers = make_optimizers(self.masters, config.optim, config.mup)
        self.guard, self.signals = Guard(config.guard), Signals(report)
        self.stage: Stage | None = None
        self.doing = "training"
        trainable.check(config.stages, self.masters)
        model.checkpointing = config.train.checkpointing
        self.writer = CheckpointWriter(folder.checkpoints, config.checkpoint.keep, self._write_model, report)
        self._unrecorded: dict[str, Any] | None = None
        self.state = TrainingState(objective, tokenizer, self.optimizers, self.guard)
        for companion in objective.companions.values():
            companion.to(dtype).eval().requires_grad_(False)
        if checkpoint is not None:
            self.state.restore(checkpoint)
            self._take_up(checkpoint.run["record"])
        self.precision = {name: choose_precision(master, dtype) for name, master in self.masters.items()}
        objective.models = {name: precision.model for name, precision in self.precision.items()}
        self.working = cast(Decoder, objective.models[MODEL])
        if config.train.compile != "false":
            use_native_kernels(self.working, report.say)
        self.probes = Probes(model, config.metrics.every, config.micro_batch_size)
        mode = "false" if config.train.deterministic and config.train.compile == "auto" else config.train.compile
        self.compiler = Compiler(mode, self.working, report)

    def train(self) -> None:
        """Training from the current step to the last.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, when the step was finished and a checkpoint written.
            InputError: too many steps skipped in a row, memory ran out, or a checkpoint was not written.
        """
        with self.signals.handled():
            try:
                self._run()
                self.writer.finish()
                self.save_model(self.folder.model)
                self.signals.check()
            except Interrupted:
                self.writer.finish()
                raise
            except Exception as error:
                self.writer.wait()  # whatever it was, the checkpoint being written is completed
                if not memory.is_out_of_memory(error):
                    raise
                raise memory.explain(error, self.config, self.dtype, self.model.device, self.doing) from error
            finally:
                self.report.stop()

    def _run(self) -> None:
        steps = self.config.train.steps
        for model in self.objective.models.values():
            model.train()
        if self.state.progress.step == 0:
            self.validate()
        elif self._unrecorded is not None:  # the run was stopped after the checkpoint, before its line was written
            self._finish_step(self._unrecorded)
        self.report.start(self.state.progress.step, steps)
        while self.state.progress.step < steps:
            record = self.step()
            at = self.state.progress.step
            is_stopping = self.signals.number is not None  # read once: a signal that stops also saves
            is_due = self._validates(at) or at % self.config.checkpoint.every == 0
            if is_due or is_stopping or self.guard.is_over:
                self.save(record)
            if self.guard.is_over:
                self.folder.append_metrics(record)
                raise self.guard.error(at)
            if is_stopping:
                self.signals.check()
            self._finish_step(record)

    def _validates(self, step: int) -> bool:
        return step % self.config.validate.every == 0 or step == self.config.train.steps

    def _finish_step(self, record: dict[str, Any]) -> None:
        """Validation if due, and the step's line of metrics."""
        if self._validates(self.state.progress.step):
            self.validate(record)
        else:
            self.folder.append_metrics(record)

    def step(self) -> dict[str, Any]:
        """Optimizer step; its line for metrics.jsonl."""
        began = time.perf_counter()
        step, config = self.state.progress.step, self.config
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout and rollouts are the same after a resume
        prepared = {name: _number(value) for name, value in self.objective.prepare(step).items()}
        self._enter_stage(step)
        optim = config.optim_at(step)
        rate = learning_rate(optim, step + 1, config.train.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
        batch = self.objective.batch(step, self.ranks.rank, self.ranks.world)
        losses = accumulate(self.objective, batch, config.micro_batch_size, self.model.device, self.ranks)
        self.ranks.sum_gradients(parameter for model in self.masters.values() for parameter in model.parameters())
        norms = clip(self.masters, optim.grad_clip)
        loss, norm = losses.loss, next((n for n in norms.values() if not math.isfinite(n)), norms["grad_norm"])
        reason = self.guard.judge(loss, norm)
        if reason is None:
            with self.probes.around(step + 1):
                self._update()
        else:
            places = self._skip(batch, reason, math.isfinite(loss))
        seconds = time.perf_counter() - began
        tokens = batch.tokens.numel() * self.ranks.world
        self._count(tokens, seconds)
        record = {**prepared, **losses.record()} | self._record(loss, rate, norms, tokens / seconds)
        record |= {"skipped": reason, "rows": places} if reason else self.probes.measures(self.objective, batch)
        self.report.step(record)
        self.compiler.after_step(seconds, config.train.steps - self.state.progress.step)
        return record

    def _update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for precision in self.precision.values():
            precision.refresh()

    def _skip(self, batch: Batch, reason: str, finite: bool) -> list[str]:
        """Skipped step: weights unchanged, and the rows with a NaN or infinite loss, or all, reported by source."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        everything = range(len(batch.tokens))
        moved = batch.to(self.model.device)
        bad = [] if finite else [i for i in everything if not is_finite(self.objective, moved.rows(i, i + 1))]
        rows = list(bad or everything)
        shown = self.objective.where(self.state.progress.step, rows[:NAMED])
        places = [f"row {row}: {place}" for row, place in zip(rows[:NAMED], shown, strict=True)]
        places += [f"and {len(rows) - NAMED} rows more"] if len(rows) > NAMED else []
        which = "the rows with a NaN or infinite loss" if bad else "all rows"
        self.report.say(f"step {self.state.progress.step + 1} skipped: {reason}; {which}: {'; '.join(places)}")
        return places

    def _enter_stage(self, step: int) -> None:
        if self.config.stages and self.config.stage(step) is not self.stage:
            if self.stage is not None:
                self.guard.recent.clear()  # losses of the previous stage do not compare
            self.stage = self.config.stage(step)
            trainable.enter(self.stage, (self.masters, self.objective.models), self.optimizers)
            change_settings(self.optimizers, self.config.optim_at(step))
            self.report.say(trainable.describe(self.config, self.masters, step))

    def _count(self, tokens: int, seconds: float) -> None:
        self.state.progress.step += 1
        self.state.progress.tokens += tokens
        self.state.progress.seconds += seconds

    def _record(self, loss: float, rate: float, norms: Mapping[str, float], speed: float) -> dict[str, Any]:
        flops = self.config.model.flops_per_token(self.config.context) * speed
        return {
            "step": self.state.progress.step,
            "loss": _number(loss),
            "lr": rate,
            **{name: _number(norm) for name, norm in norms.items()},
            "tokens": self.state.progress.tokens,
            "tokens_per_second": speed,
            "mfu": self._share_of_peak(flops),
            "seconds": self.state.progress.seconds,
        }

    def _share_of_peak(self, flops: float) -> float | None:
        """MFU: FLOP/s over the peak; a peak that a step beats was measured under contention, and is again."""
        if flops > self.peak and self.state.progress.step >= self.next_peak:
            self.peak = max(self.peak, peak_flops(self.model.device, self.dtype))
            self.next_peak = self.state.progress.step + PEAK_EVERY
            self.report.say(f"peak measured again, as a step was faster: {self.peak / 1e9:.0f} GFLOP/s")
        return flops / self.peak if flops <= self.peak else None

    def validate(self, record: dict[str, Any] | None = None) -> None:
        """Validation on held-out data and a sample; the result goes into the step's line of metrics.jsonl.

        Raises:
            Interrupted: a signal came. Nothing is lost: the checkpoint was written before.
        """
        began = time.perf_counter()
        limit, rows = self.config.validate.tokens, self.config.micro_batch_size
        self.doing = "evaluating"
        with self.signals.leaving_at_once():
            found = self.objective.validate(rows, limit)
        self.state.progress.seconds += time.perf_counter() - began
        base = record or {"step": self.state.progress.step, "tokens": self.state.progress.tokens}
        measured = {name: _number(value) for name, value in found.items()}
        self.folder.append_metrics(base | measured | {"seconds": self.state.progress.seconds})
        if self.state.progress.step and math.isfinite(found[self.objective.best[0]]):
            self.writer.losses[self.state.progress.step] = self._score(found)
        shown = ({"loss": record["loss"]} if record and record["loss"] is not None else {}) | dict(found)
        text = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
        self.report.say(f"step {self.state.progress.step}: {text}")
        with self.signals.leaving_at_once():
            self._sample()
        self.doing = "training"

    def _score(self, measures: Mapping[str, float]) -> float:
        """Measure by which the best checkpoint is kept, negated if higher is better."""
        name, direction = self.objective.best
        return measures[name] if direction == "min" else -measures[name]

    def _sample(self) -> None:
        wanted = self.config.sample
        if not (wanted.max_new_tokens and wanted.prompts and self.objective.writes_text):
            return
        sampling = Sampling(temperature=wanted.temperature, seed=self.config.seed)
        for prompt in wanted.prompts:
            completion = generate(self.working, self.tokenizer, [prompt], wanted.max_new_tokens, sampling)[0]
            self.report.say("  | " + (prompt + completion.text).strip().replace("\n", "\n  | "))

    def save(self, record: Mapping[str, Any]) -> None:
        """Checkpoint; `record` is the line of the last step taken."""
        tensors, run = self.state.tensors(), self.state.run(record)
        self.writer.submit(lambda: CheckpointCopy.of(self.model.state_dict(), tensors, run))

    def save_model(self, path: Path) -> None:
        """Model folder, complete or absent."""
        replace_folder(path, lambda folder: self._write_model(folder, self.model.state_dict()))

    def _write_model(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        hf.write(path, self.model.config, tensors)
        self.tokenizer.save(path)
        bos = self.tokenizer.bos_id if self.tokenizer.add_bos else None
        hf.write_token_ids(path, bos_id=bos, eos_id=self.tokenizer.eos_id)

    def _take_up(self, record: dict[str, Any]) -> None:
        """Rewind of metrics.jsonl and the best losses to the checkpoint's step."""
        step = self.state.progress.step
        lines = [line for line in self.folder.read_metrics() if line["step"] <= step]
        self.writer.losses = {
            line["step"]: self._score(line)
            for line in lines
            if line["step"] and line.get(self.objective.best[0]) is not None
        }
        is_complete = bool(lines) and lines[-1]["step"] == step
        if not is_complete or (self._validates(step) and step not in self.writer.losses):
            self.folder.rewind_metrics(step - 1)
            self._unrecorded = record
        else:
            self.folder.rewind_metrics(step)


def _number(value: float) -> float | None:
    """JSON number, None if not finite."""
    return value if math.isfinite(value) else None
