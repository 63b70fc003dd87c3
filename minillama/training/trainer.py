"""Training loop. Every step is a pure function of the parameters, the optimizer's state, seed and step."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from typing import Any, cast

import tomli_w
import torch

from minillama.device import peak_flops
from minillama.files import replace_folder
from minillama.inference.chat import ChatPrompts, why_empty
from minillama.inference.generate import generate
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.runs import memory
from minillama.runs.checkpoint import Checkpoint
from minillama.runs.config import RunConfig, to_table
from minillama.runs.folder import RunFolder, read_metrics
from minillama.runs.report import Report, quoted
from minillama.runs.sections import Stage
from minillama.runs.signals import Interrupted, Signals
from minillama.runs.writer import CheckpointWriter
from minillama.training import trainable
from minillama.training.compile import Compiler, use_native_kernels
from minillama.training.duration import TIMED, Duration
from minillama.training.gradients import accumulate, clip, is_finite
from minillama.training.guard import Guard
from minillama.training.model_folder import ModelFolder
from minillama.training.objectives import MODEL, Batch, Objective
from minillama.training.optim.groups import change_settings, make_optimizers
from minillama.training.optim.schedule import learning_rate
from minillama.training.pace import Pace
from minillama.training.parallel import Parallel
from minillama.training.precision import Precision, choose_precision
from minillama.training.probes import TaskAccuracy, attention_logit_max, matrices, update_ratio
from minillama.training.ranks import Ranks
from minillama.training.sharded import gathered
from minillama.training.state import TrainingState

PEAK_EVERY = 50  # steps between two measurements of the peak, at least
NAMED = 8  # rows of a skipped batch whose sources are reported
RANK = 0x9E3779B1  # between the seeds of two processes: a CPU's generator takes the lower 32 bits of a seed alone


@dataclass(eq=False)
class Trainer:
    """Training loop of a model in a run folder.

    Args:
        dtype: of the forward and backward passes.
        objective: the loss, its data and its models, on their device.
        saved: how the model is written.
        folder: where everything is written.
        report: where everything is printed.
        checkpoint: to resume from; None starts at step 0.
        parallel: the processes that train; the models are divided among them.

    Raises:
        InputError: the checkpoint was made with other data, or beside other frozen models.
    """

    config: RunConfig
    dtype: torch.dtype
    objective: Objective
    saved: ModelFolder
    folder: RunFolder
    report: Report
    checkpoint: InitVar[Checkpoint | None] = None
    parallel: Parallel = field(default_factory=Parallel)
    duration: Duration = field(default_factory=Duration)

    def __post_init__(self, checkpoint: Checkpoint | None) -> None:
        config, objective, dtype, report = self.config, self.objective, self.dtype, self.report
        self.masters, self.ranks = dict(objective.models), self.parallel.ranks
        self.saved.check()
        for master in self.masters.values():
            self.parallel.divide(master, dtype)
        self.model = model = cast(Decoder, self.masters[MODEL])
        self.peak, self.next_peak = peak_flops(model.device, dtype), 0
        self.optimizers = make_optimizers(self.masters, config.optim, config.mup, objective.rates)
        self.guard, self.signals = Guard(config.guard), Signals(report)
        self.stage: Stage | None = None
        self.phase = "training"
        sharing = Ranks() if self.parallel.casts else self.ranks
        self.accuracy = TaskAccuracy(config.validate, self.saved.tokenizer, sharing)
        self.pace = Pace(self.ranks)
        trainable.check(config.stages, self.masters)
        model.checkpointing = config.train.checkpointing
        keep, leads = config.checkpoint.keep, self.ranks.leads
        self.writer = CheckpointWriter(self.folder.checkpoints, keep, self.saved.write, report, leads)
        self._unrecorded: dict[str, Any] | None = None
        self.state = TrainingState(objective, self.saved, self.optimizers, self.guard)
        for companion in objective.companions.values():
            companion.to(dtype).eval().requires_grad_(False)
            if isinstance(companion, Decoder) and companion.config == model.config:  # reward models stay whole
                self.parallel.divide(companion, dtype)  # a policy that is still its reference computes the same bits
        if checkpoint is not None:
            self.state.restore(checkpoint)
            self._rewind(checkpoint.run["record"])
        choose = Precision if self.parallel.casts else partial(choose_precision, dtype=dtype)
        self.precision = {name: choose(master) for name, master in self.masters.items()}
        objective.models = {name: precision.model for name, precision in self.precision.items()}
        self.working = cast(Decoder, objective.models[MODEL])
        if config.train.compile != "false" and not self.parallel.divides:
            alike = *objective.models.values(), *objective.companions.values()  # which then compute the same bits
            use_native_kernels(alike, self.working, report.say)
        by_clock = self.ranks.processes > 1 or config.train.deterministic  # which all processes would read differently
        stays_eager = config.train.compile == "auto" and (by_clock or not objective.compiles)
        self.compiler = Compiler("false" if stays_eager else config.train.compile, self.working, report)

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
                self._write_models()
                self.signals.check()
            except Interrupted:
                self.writer.finish()
                raise
            except Exception as error:
                self.writer.over.set()
                self.writer.wait()  # whatever it was, the checkpoint being written is completed
                if not memory.is_out_of_memory(error):
                    raise
                where = self.model.device, self.phase, self.parallel.sizes
                raise memory.explain(error, self.config, self.dtype, *where) from error
            finally:
                self.report.stop()

    def _write_models(self) -> None:
        tensors = gathered(self.saved.tensors(), self.ranks.leads)
        further = self.objective.folders(self.masters, self.saved)  # gathered by all
        if self.ranks.leads:
            replace_folder(self.folder.model, lambda path: self.saved.write(path, tensors))
            for name, write in further.items():
                replace_folder(self.folder.path / name, write)

    def _run(self) -> None:
        for model in self.objective.models.values():
            model.train()
        if self.state.step == 0:
            self.validate({"step": 0, "tokens": 0})
        elif self._unrecorded is not None:  # the run was stopped after the checkpoint, before its line was written
            self._finish_step(self._unrecorded)
        if self.config.train.minutes:  # until they are resolved there are more steps than the minutes hold
            self.config = replace(self.config, train=replace(self.config.train, steps=sys.maxsize))
            self.report.say("timing the first steps")
        else:
            self.report.start(self.state.step, self.config.train.steps)
        while self.state.step < self.config.train.steps:
            record = self.step()
            at = self.state.step
            agreed = int(
                self.ranks.most(self.signals.number or 0)
            )  # read once, and by all: a signal that stops also saves
            self.signals.number = self.signals.number or agreed or None
            is_stopping = bool(agreed)
            is_due = self._validates(at) or at % self.config.checkpoint.every == 0
            if is_due or is_stopping or self.guard.is_over:
                self.writer.submit(partial(self.state.copy, record))
            if self.guard.is_over:
                self.writer.finish()
                self.ranks.most(0.0)  # none ends, and ends the others, before all have saved
                self.folder.record(record)
                raise self.guard.error(at)
            if is_stopping:
                self.signals.check()
            self._finish_step(record)

    def _validates(self, step: int) -> bool:
        steps = self.config.train.steps
        return step % self.config.validate.interval(steps) == 0 or step == steps

    def _finish_step(self, record: dict[str, Any]) -> None:
        """Validation if due, and the step's line of metrics."""
        if self._validates(self.state.step):
            self.validate(record)
        else:
            self.folder.record(record)

    def step(self) -> dict[str, Any]:
        """Optimizer step, after a rollout if due; its line for metrics.jsonl."""
        began = time.perf_counter()
        step, config = self.state.step, self.config
        # dropout is the same after a resume, and of its rows and tokens in every process
        torch.manual_seed(config.seed * 1_000_003 + step + self.ranks.index * RANK)
        prepared = self.objective.prepare(step)
        trains = time.perf_counter()
        self._enter_stage(step)
        optim = config.optim_at(step)
        rate = learning_rate(optim, step + 1, config.train.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
        with self.parallel.step():  # rollouts, the rows of a skipped step and a terminal take as long as they take
            batch = self.objective.batch(step, self.ranks.rank, self.ranks.world)
            share = accumulate(self.objective, batch, config.micro_batch_size, self.model.device)
            self.pace.add(time.perf_counter() - trains)
            losses = share.summed(self.ranks)
            self.ranks.sum_gradients(parameter for model in self.masters.values() for parameter in model.parameters())
            norms = clip(self.masters, optim.grad_clip)
            norm = next((norm for norm in norms.values() if not math.isfinite(norm)), norms["grad_norm"])
            reason = self.guard.judge(*self.ranks.leaders([losses.loss, norm]))  # one verdict, to the bit
        outcome = self._update(step + 1) if reason is None else self._skip(batch, reason, math.isfinite(losses.loss))
        tokens = int(self.ranks.sum({"tokens": batch.kept.sum().item()})["tokens"])
        now = time.perf_counter()
        seconds = now - began
        self.state.count(tokens, seconds)
        record = _finite({**prepared, **losses.record(), "step": step + 1, "loss": losses.loss, "lr": rate, **norms})
        record |= self._costs(tokens / (now - trains))
        if "update_ratio" in outcome:
            rows = batch.rows(0, config.micro_batch_size).to(self.model.device)
            highest = attention_logit_max(self.model, self.objective, rows)
            outcome["attention_logit_max"] = self.ranks.most(highest)
            outcome = {name: value for name, value in outcome.items() if math.isfinite(value)}
        record |= outcome
        if not self.config.train.minutes:
            self.report.step(record)
        self._after_step(seconds)
        return record

    def _after_step(self, seconds: float) -> None:
        """Decide on compilation and on the number of steps, by the time that steps take."""
        config, step = self.config, self.state.step
        if self.compiler.settled and not config.train.minutes:
            return
        self.duration.seconds.append(seconds)
        self.compiler.after_step(self.duration, self.duration.left(config, step))
        if config.train.minutes and self.compiler.settled and len(self.duration.seconds) >= TIMED - 1:
            self.config = self.ranks.leaders(self.duration.resolved(config, step))
            if self.ranks.leads:
                self.folder.write_config(tomli_w.dumps(to_table(self.config)))
            steps, each = self.config.train.steps, self.duration.typical
            budget = f"{config.train.minutes:g} minutes, at {each:.2g} s each"
            is_over = steps == step + 1  # the fewest there can be
            self.report.say(f"{steps} steps, more than fit into {budget}" if is_over else f"{steps} steps in {budget}")
            self.report.start(step, steps)

    def _update(self, step: int) -> dict[str, Any]:
        """Update of the weights; its ratio to them, if due."""
        every = self.config.metrics.every
        is_measured = every > 0 and step % every == 0
        before = [matrix.clone() for matrix in matrices(self.model)] if is_measured else []
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for precision in self.precision.values():
            precision.refresh()
        self.objective.updated(self.masters)
        return {"update_ratio": update_ratio(before, matrices(self.model))} if is_measured else {}

    def _skip(self, batch: Batch, reason: str, finite: bool) -> dict[str, Any]:
        """Skipped step: weights unchanged, and the rows with a NaN or infinite loss, or all, reported by source."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        count, moved = len(batch.tokens), batch.to(self.model.device)
        everything, first = range(count * self.ranks.world), self.ranks.rank * count
        bad = [] if finite else [i for i in range(count) if not is_finite(self.objective, moved.rows(i, i + 1))]
        found = self.ranks.sum({f"{row}": float(row - first in bad) for row in everything})
        bad = [row for row in everything if found[f"{row}"]]
        rows = list(bad or everything)
        shown = self.objective.where(self.state.step, rows[:NAMED])
        locations = [f"row {row}: {location}" for row, location in zip(rows[:NAMED], shown, strict=True)]
        locations += [f"and {len(rows) - NAMED} rows more"] if len(rows) > NAMED else []
        which = "the rows with a NaN or infinite loss" if bad else "all rows"
        self.report.say(f"step {self.state.step + 1} skipped: {reason}; {which}: {'; '.join(locations)}")
        return {"skipped": reason, "rows": locations}

    def _enter_stage(self, step: int) -> None:
        if self.config.stages and self.config.stage(step) is not self.stage:
            if self.stage is not None:
                self.guard.recent.clear()  # losses of the previous stage do not compare
            self.stage = self.config.stage(step)
            trainable.enter(self.stage, (self.masters, self.objective.models), self.optimizers)
            change_settings(self.optimizers, self.config.optim_at(step))
            self.report.say(trainable.describe(self.config, self.masters, step))

    def _costs(self, speed: float) -> dict[str, float | None]:
        """Tokens and seconds so far, tokens per second, MFU: FLOP/s over the peak.

        A peak that a step beats was measured under contention, and is again.
        """
        flops = self.config.model.flops_per_token(self.config.context) * speed / self.ranks.processes
        if self.config.lora is not None:  # no gradients of the frozen weights
            flops *= 2 / 3
        if flops > self.peak and self.state.step >= self.next_peak:
            self.peak = max(self.peak, peak_flops(self.model.device, self.dtype))
            self.next_peak = self.state.step + PEAK_EVERY
            self.report.say(f"peak measured again, as a step was faster: {self.peak / 1e9:.0f} GFLOP/s")
        mfu, state = flops / self.peak if flops <= self.peak else None, self.state
        return {"tokens": state.tokens, "tokens_per_second": speed, "mfu": mfu, "seconds": state.seconds}

    def validate(self, record: dict[str, Any]) -> None:
        """Validation on held-out data and a sample; the result goes into `record`, the step's line of metrics.jsonl.

        Raises:
            Interrupted: a signal came. Nothing is lost: the checkpoint was written before.
        """
        began = time.perf_counter()
        self.phase = "evaluating"
        with self._interruptible():
            found = self.objective.validate(self.config.micro_batch_size, self.config.validate.tokens)
            found = {**found, **self.accuracy(self.working)}
        self.duration.validation = time.perf_counter() - began
        self.state.seconds += self.duration.validation
        sample = {"sample": dict(self.objective.sample)} if self.objective.sample else {}
        self.folder.record(record | _finite(found) | {"seconds": self.state.seconds} | sample)
        if self.state.step and math.isfinite(found[self.objective.best[0]]):
            self.writer.losses[self.state.step] = self._score(found)
        shown = ({"loss": record["loss"]} if record.get("loss") is not None else {}) | dict(found)
        text = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
        self.report.say(f"step {self.state.step}: {text}")
        if slow := self.pace.slowest():
            self.report.say(slow)
        for line in self.objective.warnings({**record, **found}) if self.state.step else ():
            self.report.say(f"warning: {line}")
        with self._interruptible():
            self._sample()
        self.duration.validation = time.perf_counter() - began
        self.phase = "training"

    def _interruptible(self) -> AbstractContextManager[None]:
        """A block that a signal ends; where others take part in it, the next step does."""
        return self.signals.leaving_at_once() if self.ranks.processes == 1 else nullcontext()

    def _score(self, measures: Mapping[str, float]) -> float:
        """Measure by which the best checkpoint is kept, negated if higher is better."""
        name, direction = self.objective.best
        return measures[name] if direction == "min" else -measures[name]

    def _sample(self) -> None:
        wanted, tokenizer = self.config.sample, self.saved.tokenizer
        for name, value in self.objective.sample.items():
            self.report.say(quoted(f"{name}: {str(value).strip()}"))
        if not (wanted.max_new_tokens and self.objective.writes_text):
            return
        sampling = Sampling(temperature=wanted.temperature, seed=self.config.seed)
        asks = self.config.data.template and tokenizer.chat_template is not None
        ask: Callable[[str], str | Sequence[int]] = ChatPrompts(tokenizer) if asks and wanted.prompts else str
        prompts: Sequence[str | Sequence[int]] = list(map(ask, wanted.prompts)) or self.objective.prompts
        for prompt in prompts:
            completion = generate(self.working, tokenizer, [prompt], wanted.max_new_tokens, sampling)[0]
            text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            empty = "" if completion.text.strip() else f" (no text: {why_empty(completion.reason)})"
            self.report.say(quoted(text + completion.text + empty))

    def _rewind(self, record: dict[str, Any]) -> None:
        """Rewind of metrics.jsonl and the best losses to the checkpoint's step, as the first process reads them."""
        self.writer.losses, is_complete = self.ranks.leaders(self._recorded() if self.ranks.leads else ({}, False))
        self.folder.rewind_metrics(self.state.step if is_complete else self.state.step - 1)
        self._unrecorded = None if is_complete else record

    def _recorded(self) -> tuple[dict[int, float], bool]:
        """Losses of the validations so far, and whether the line of the checkpoint's step is complete."""
        step = self.state.step
        lines = [line for line in read_metrics(self.folder.metrics) if line["step"] <= step]
        losses = {
            line["step"]: self._score(line)
            for line in lines
            if line["step"] and line.get(self.objective.best[0]) is not None
        }
        is_scored = step in losses or not self._validates(step)
        return losses, bool(lines) and lines[-1]["step"] == step and is_scored


def _finite(values: Mapping[str, float]) -> dict[str, Any]:
    """JSON numbers; None for what is NaN or infinite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
