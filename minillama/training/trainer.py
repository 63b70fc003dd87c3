"""The training loop. Every step is a pure function of the parameters, the optimizer's state, seed and step."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from minillama.atomic import replace_folder
from minillama.data.corpus import Corpus
from minillama.data.records import Records
from minillama.device import choose_dtype, peak_flops
from minillama.errors import InputError
from minillama.formats.hf import write_token_ids
from minillama.generation import generate
from minillama.model import Decoder
from minillama.sampling import Sampling
from minillama.tokenizer import Tokenizer
from minillama.training import stages
from minillama.training.checkpoint import Checkpoint, prune, save_checkpoint
from minillama.training.compiling import Compiler
from minillama.training.config import RunConfig, Stage
from minillama.training.objectives import Batch, make
from minillama.training.optim import change_settings, load_optimizer_state, make_optimizers, optimizer_state
from minillama.training.precision import WorkingCopy
from minillama.training.report import Report
from minillama.training.run_folder import RunFolder
from minillama.training.schedule import learning_rate

__all__ = ["Interrupted", "Trainer"]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; the run was saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Progress:
    """What a checkpoint must bring back besides tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains a model in a run folder.

    Args:
        config: the run.
        model: the decoder, on its device.
        tokenizer: saved beside every model.
        data: what the objective reads.
        folder: where everything is written.
        report: where everything is said.
        checkpoint: where to go on from; None starts at step 0.

    Raises:
        InputError: the checkpoint was made with other data.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Decoder,
        tokenizer: Tokenizer,
        data: Corpus | Records,
        folder: RunFolder,
        report: Report,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config, self.model, self.tokenizer, self.data = config, model, tokenizer, data
        self.folder, self.report = folder, report
        self.dtype = choose_dtype(config.train.dtype, model.device)
        self.peak = peak_flops(model.device, self.dtype)
        self.objective = make(config, tokenizer, data.separator)
        self.optimizers = make_optimizers(model, config.optim)
        self.progress = Progress()
        self.signal: int | None = None
        self.stage: Stage | None = None
        stages.check(config)
        model.checkpointing = config.train.checkpointing
        if checkpoint is not None:
            self._restore(checkpoint)
        self.working = WorkingCopy(model, self.dtype)
        self.compiler = Compiler(config.train.compile, self.working.model, report)

    def train(self) -> None:
        """Run from the current step to the last.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, when the step was finished and a checkpoint written.
            InputError: the loss is no number any more.
        """
        steps, every = self.config.train.steps, self.config.validate.every
        self.working.model.train()
        with self._signals():
            if self.progress.step == 0:
                self.validate()
            self.report.start(self.progress.step, steps)
            while self.progress.step < steps:
                record = self.step()
                at = self.progress.step
                if at % every == 0 or at == steps:
                    record |= self.validate(record)
                else:
                    self.folder.append_metrics(record)
                if at % self.config.checkpoint.every == 0 or at == steps or self.signal is not None:
                    self.save()
                if self.signal is not None:
                    raise Interrupted(self.signal)
        self.save_model(self.folder.model)

    def step(self) -> dict[str, Any]:
        """One optimizer step; its line for metrics.jsonl."""
        began = time.perf_counter()
        step, config = self.progress.step, self.config
        self.objective.prepare(step)
        self._enter_stage(step)
        optim = config.optim_at(step)
        rate = learning_rate(optim, step + 1, config.train.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
        if config.train.dropout:
            torch.manual_seed(config.seed * 1_000_003 + step)  # the same masks after a resume
        batch = self.objective.batch(self.data, config.seed, step)
        loss, metrics = self._accumulate(batch)
        limit = optim.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"the loss or its gradient is no number at step {step + 1}",
                found=f"loss {loss}, gradient norm {norm}",
                fix="lower optim.lr, or go on from the last checkpoint with --resume and another seed",
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.working.refresh()
        seconds = time.perf_counter() - began
        self._count(batch.tokens.numel(), seconds)
        record = self._record(loss, rate, norm, batch.tokens.numel() / seconds) | metrics
        self.report.step(record)
        self.compiler.after_step(seconds, config.train.steps - self.progress.step)
        return record

    def _accumulate(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Gradients of the whole batch, one micro-batch at a time; the loss a unit of weight."""
        size, rows = self.config.micro_batch_size, len(batch.tokens)
        weight = batch.weights.sum().item()
        total = 0.0
        sums: dict[str, float] = {}
        for start in range(0, rows, size):
            part = batch.rows(start, start + size).to(self.model.device)
            loss, _, metrics = self.objective.loss(self.working.model, part)
            (loss / weight).backward()
            self.working.collect()
            total += loss.item()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        return total / weight, {name: value / weight for name, value in sums.items()}

    def _enter_stage(self, step: int) -> None:
        if self.config.stages and self.config.stage(step) is not self.stage:
            self.stage = self.config.stage(step)
            stages.enter(self.stage, (self.model, self.working.model), self.optimizers)
            change_settings(self.optimizers, self.config.optim_at(step))
            self.report.say(stages.describe(self.config, step))

    def _count(self, tokens: int, seconds: float) -> None:
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.seconds += seconds

    def _record(self, loss: float, rate: float, norm: float, speed: float) -> dict[str, Any]:
        flops = self.config.model.flops_per_token(self.config.context)
        return {
            "step": self.progress.step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": self.progress.tokens,
            "tokens_per_second": speed,
            "mfu": flops * speed / self.peak,
            "seconds": self.progress.seconds,
        }

    def validate(self, record: dict[str, Any] | None = None) -> dict[str, Any]:
        """Score held-out data and print a sample; the result goes into the step's line of metrics.jsonl."""
        began = time.perf_counter()
        limit, rows = self.config.validate.tokens, self.config.micro_batch_size
        found = self.objective.validate(self.working.model, self.data, limit, rows)
        self.progress.seconds += time.perf_counter() - began
        measured = found | {"seconds": self.progress.seconds}
        base = record or {"step": self.progress.step, "tokens": self.progress.tokens}
        self.folder.append_metrics(base | measured)
        shown = ({"loss": record["loss"]} if record else {}) | found
        text = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
        self.report.say(f"step {self.progress.step}: {text}")
        self._sample()
        return measured

    def _sample(self) -> None:
        wanted = self.config.sample
        if not (wanted.max_new_tokens and wanted.prompts):
            return
        sampling = Sampling(temperature=wanted.temperature, seed=self.config.seed)
        for prompt in wanted.prompts:
            completion = generate(self.working.model, self.tokenizer, [prompt], wanted.max_new_tokens, sampling)[0]
            self.report.say("  | " + (prompt + completion.text).strip().replace("\n", "\n  | "))

    def save(self) -> None:
        """Write a checkpoint and drop the oldest ones."""
        tensors = optimizer_state(self.optimizers)
        tensors |= {f"objective/{name}": value for name, value in self.objective.state_dict().items()}
        run = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "data": self.data.fingerprint,
            "finished": self.progress.step >= self.config.train.steps,
        }
        save_checkpoint(self.folder.checkpoints, self._write_model, tensors, run)
        prune(self.folder.checkpoints, self.config.checkpoint.keep)

    def save_model(self, path: Path) -> None:
        """Write a model folder that is complete or absent."""
        replace_folder(path, self._write_model)

    def _write_model(self, path: Path) -> None:
        self.model.save_pretrained(path)
        self.tokenizer.save(path)
        bos = self.tokenizer.bos_id if self.tokenizer.add_bos else None
        write_token_ids(path, bos_id=bos, eos_id=self.tokenizer.eos_id)

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.run["data"] != self.data.fingerprint:
            raise InputError(
                "the data is not what the checkpoint was trained on",
                where=checkpoint.path,
                found=f"fingerprint {self.data.fingerprint[:16]}",
                expected=checkpoint.run["data"][:16],
                fix="bring the data back, or start a new run",
            )
        saved = Decoder.from_pretrained(checkpoint.path, torch.float32, self.model.device)
        self.model.load_state_dict(saved.state_dict())
        tensors = checkpoint.optimizer_tensors()
        prefix = "objective/"
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        self.objective.load_state_dict(own)
        load_optimizer_state(self.optimizers, {n: t for n, t in tensors.items() if not n.startswith(prefix)})
        run = checkpoint.run
        self.progress = Progress(run["step"], run["tokens"], run["seconds"])
        self.folder.rewind_metrics(self.progress.step)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM let the step finish and a checkpoint be written; a second one stops at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number
            self.report.say("stopping after this step; once more stops at once")

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, which alone may handle signals
            yield
            return
        try:
            yield
        finally:
            self.report.stop()
            for number, handler in before.items():
                signal.signal(number, handler)
