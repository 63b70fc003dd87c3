"""Training loop. Every step is a pure function of the parameters, the optimizer's state, seed and step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from minillama.device import choose_dtype, peak_flops
from minillama.errors import InputError
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
from minillama.training.objectives.base import digest
from minillama.training.optim.groups import change_settings, load_optimizer_state, make_optimizers, optimizer_state
from minillama.training.optim.schedule import learning_rate
from minillama.training.precision import WorkingCopy
from minillama.training.probes import Probes

PEAK_EVERY = 50  # steps between two measurements of the peak, at least
NAMED = 8  # rows of a skipped batch whose sources are reported


@dataclass
class Progress:
    """Progress that a checkpoint restores besides tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """Training loop of a model in a run folder.

    Args:
        config: the run.
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
        objective: Objective,
        tokenizer: Tokenizer,
        folder: RunFolder,
        report: Report,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config, self.objective, self.tokenizer = config, objective, tokenizer
        self.folder, self.report = folder, report
        self.masters = dict(objective.models)
        self.model = model = cast(Decoder, self.masters[MODEL])
        self.dtype = choose_dtype(config.train.dtype, model.device)
        self.peak, self.next_peak = peak_flops(model.device, self.dtype), 0
        self.optimizers = make_optimizers(self.masters, config.optim)
        self.progress, self.guard, self.signals = Progress(), Guard(config.guard), Signals(report)
        self.stage: Stage | None = None
        self.doing = "training"
        trainable.check(config)
        model.checkpointing = config.train.checkpointing
        self.writer = CheckpointWriter(folder.checkpoints, config.checkpoint.keep, self._write_model, report)
        self._unrecorded: dict[str, Any] | None = None
        self.companions = {name: digest(companion) for name, companion in objective.companions.items()}
        for companion in objective.companions.values():
            companion.to(self.dtype).eval().requires_grad_(False)
        if checkpoint is not None:
            self._restore(checkpoint)
        self.copies = {name: WorkingCopy(master, self.dtype) for name, master in self.masters.items()}
        objective.models = {name: copy.model for name, copy in self.copies.items()}
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
        if self.progress.step == 0:
            self.validate()
        elif self._unrecorded is not None:  # the run was stopped after the checkpoint, before its line was written
            self._finish_step(self._unrecorded)
        self.report.start(self.progress.step, steps)
        while self.progress.step < steps:
            record = self.step()
            at = self.progress.step
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
        if self._validates(self.progress.step):
            self.validate(record)
        else:
            self.folder.append_metrics(record)

    def step(self) -> dict[str, Any]:
        """Optimizer step; its line for metrics.jsonl."""
        began = time.perf_counter()
        step, config = self.progress.step, self.config
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout and rollouts are the same after a resume
        prepared = {name: _number(value) for name, value in self.objective.prepare(step).items()}
        self._enter_stage(step)
        optim = config.optim_at(step)
        rate = learning_rate(optim, step + 1, config.train.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
        batch = self.objective.batch(step)
        losses = accumulate(self.objective, batch, config.micro_batch_size, self.model.device)
        norms = clip(self.masters, optim.grad_clip)
        loss, norm = losses.loss, next((n for n in norms.values() if not math.isfinite(n)), norms["grad_norm"])
        reason = self.guard.judge(loss, norm)
        if reason is None:
            with self.probes.around(step + 1):
                self._update()
        else:
            places = self._skip(batch, reason, math.isfinite(loss))
        seconds = time.perf_counter() - began
        self._count(batch.tokens.numel(), seconds)
        record = self._record(loss, rate, norms, batch.tokens.numel() / seconds) | {**prepared, **losses.record()}
        record |= {"skipped": reason, "rows": places} if reason else self.probes.measures(self.objective, batch)
        self.report.step(record)
        self.compiler.after_step(seconds, config.train.steps - self.progress.step)
        return record

    def _update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for copy in self.copies.values():
            copy.refresh()

    def _skip(self, batch: Batch, reason: str, finite: bool) -> list[str]:
        """Skipped step: weights unchanged, and the rows with a NaN or infinite loss, or all, reported by source."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        everything = range(len(batch.tokens))
        moved = batch.to(self.model.device)
        bad = [] if finite else [i for i in everything if not is_finite(self.objective, moved.rows(i, i + 1))]
        rows = list(bad or everything)
        shown = self.objective.where(self.progress.step, rows[:NAMED])
        places = [f"row {row}: {place}" for row, place in zip(rows[:NAMED], shown, strict=True)]
        places += [f"and {len(rows) - NAMED} rows more"] if len(rows) > NAMED else []
        which = "the rows whose loss is no number" if bad else "all rows"
        self.report.say(f"step {self.progress.step + 1} skipped: {reason}; {which}: {'; '.join(places)}")
        return places

    def _enter_stage(self, step: int) -> None:
        if self.config.stages and self.config.stage(step) is not self.stage:
            if self.stage is not None:
                self.guard.recent.clear()  # losses of the previous stage do not compare
            self.stage = self.config.stage(step)
            trainable.enter(self.stage, (self.masters, self.objective.models), self.optimizers)
            change_settings(self.optimizers, self.config.optim_at(step))
            self.report.say(trainable.describe(self.config, step))

    def _count(self, tokens: int, seconds: float) -> None:
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.seconds += seconds

    def _record(self, loss: float, rate: float, norms: Mapping[str, float], speed: float) -> dict[str, Any]:
        flops = self.config.model.flops_per_token(self.config.context) * speed
        return {
            "step": self.progress.step,
            "loss": _number(loss),
            "lr": rate,
            **{name: _number(norm) for name, norm in norms.items()},
            "tokens": self.progress.tokens,
            "tokens_per_second": speed,
            "mfu": self._share_of_peak(flops),
            "seconds": self.progress.seconds,
        }

    def _share_of_peak(self, flops: float) -> float | None:
        """MFU: FLOP/s over the peak; a peak that a step beats was measured under contention, and is again."""
        if flops > self.peak and self.progress.step >= self.next_peak:
            self.peak = max(self.peak, peak_flops(self.model.device, self.dtype))
            self.next_peak = self.progress.step + PEAK_EVERY
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
        self.progress.seconds += time.perf_counter() - began
        base = record or {"step": self.progress.step, "tokens": self.progress.tokens}
        measured = {name: _number(value) for name, value in found.items()}
        self.folder.append_metrics(base | measured | {"seconds": self.progress.seconds})
        if self.progress.step and math.isfinite(found[self.objective.best[0]]):
            self.writer.losses[self.progress.step] = self._badness(found)
        shown = ({"loss": record["loss"]} if record and record["loss"] is not None else {}) | dict(found)
        text = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
        self.report.say(f"step {self.progress.step}: {text}")
        with self.signals.leaving_at_once():
            self._sample()
        self.doing = "training"

    def _badness(self, measures: Mapping[str, float]) -> float:
        """Metric by which the best checkpoint is kept, lower is better."""
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
        tensors = optimizer_state(self.optimizers)
        tensors |= {f"objective/{name}": value for name, value in self.objective.state_dict().items()}
        tensors |= {f"models/{name}/{key}": value for name, key, value in self._others()}
        run = (
            asdict(self.progress)
            | {
                "data": self.objective.fingerprint,
                "tokenizer": self.tokenizer.fingerprint,
                "guard": self.guard.state(),
                "record": dict(record),
            }
            | ({"companions": self.companions} if self.companions else {})
        )
        self.writer.submit(lambda: CheckpointCopy.of(self.model.state_dict(), tensors, run))

    def _others(self) -> Iterator[tuple[str, str, Tensor]]:
        """Tensors of the models that have no model folder."""
        for name, master in self.masters.items():
            for key, value in master.state_dict().items() if name != MODEL else ():
                yield name, key, value

    def save_model(self, path: Path) -> None:
        """Model folder, complete or absent."""
        replace_folder(path, lambda folder: self._write_model(folder, self.model.state_dict()))

    def _write_model(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        hf.write(path, self.model.config, tensors)
        self.tokenizer.save(path)
        bos = self.tokenizer.bos_id if self.tokenizer.add_bos else None
        hf.write_token_ids(path, bos_id=bos, eos_id=self.tokenizer.eos_id)

    def _restore(self, checkpoint: Checkpoint) -> None:
        run = checkpoint.run
        before, now = dict(run.get("companions", {})), self.companions
        same = {name: (before.get(name, "none"), now.get(name, "none")) for name in sorted({*before, *now})}
        same |= {"data": (run["data"], self.objective.fingerprint)}
        same |= {"tokenizer": (run["tokenizer"], self.tokenizer.fingerprint)}
        for name, (expected, found) in same.items():
            if expected != found:
                raise InputError(
                    f"the {name} is not what the checkpoint was trained on",
                    where=checkpoint.path,
                    found=f"fingerprint {found[:16]}",
                    expected=expected[:16],
                    fix=f"bring the {name} back, or start a new run",
                )
        saved = Decoder.from_pretrained(checkpoint.path, torch.float32, self.model.device)
        self.model.load_state_dict(saved.state_dict())
        tensors = checkpoint.optimizer_tensors()
        self.objective.load_state_dict(_taken(tensors, "objective/"))
        for name, master in self.masters.items():
            if name != MODEL:
                master.load_state_dict(_taken(tensors, f"models/{name}/"))
        load_optimizer_state(self.optimizers, tensors)
        self.progress = Progress(run["step"], run["tokens"], run["seconds"])
        self.guard.restore(run["guard"])
        self._take_up(run["record"])

    def _take_up(self, record: dict[str, Any]) -> None:
        """Rewind of metrics.jsonl and the best losses to the checkpoint's step."""
        step = self.progress.step
        lines = [line for line in self.folder.read_metrics() if line["step"] <= step]
        self.writer.losses = {
            line["step"]: self._badness(line)
            for line in lines
            if line["step"] and line.get(self.objective.best[0]) is not None
        }
        is_complete = bool(lines) and lines[-1]["step"] == step
        if not is_complete or (self._validates(step) and step not in self.writer.losses):
            self.folder.rewind_metrics(step - 1)
            self._unrecorded = record
        else:
            self.folder.rewind_metrics(step)


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors removed by name prefix, named without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def _number(value: float) -> float | None:
    """JSON number, None if not finite."""
    return value if math.isfinite(value) else None
