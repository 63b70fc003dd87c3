"""Training run: data, tokenizer, model, loop, and next commands."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import tomli_w
import torch

from minillama.config import ModelConfig
from minillama.config.arguments import checked
from minillama.config.loader import to_dict
from minillama.errors import InputError
from minillama.formats.model_file import ModelFile
from minillama.runs.checkpoint import Checkpoint, newest_checkpoint, remove_parts, set_aside
from minillama.runs.config import RunConfig, load_run_config, to_table
from minillama.runs.diff import check_resumed, differences
from minillama.runs.folder import RunFolder, choose_folder, read_lines, read_metrics
from minillama.runs.log import MetricsLog
from minillama.runs.memory import GIB, check_disk, peak_memory, warn_of_memory
from minillama.runs.plot import MISSING, sparkline, write_png
from minillama.runs.provenance import provenance
from minillama.runs.record import PYTHON_OBJECTIVE
from minillama.runs.report import Report, SilentReport, make_report
from minillama.runs.signals import Interrupted
from minillama.tokenizer import Tokenizer
from minillama.training import next_commands
from minillama.training.data import load_data, load_stages
from minillama.training.duration import Duration
from minillama.training.init_model import Start, resolve
from minillama.training.model_folder import ModelFolder
from minillama.training.objectives import MakeObjective, make, make_staged
from minillama.training.optim.schedule import learning_rate
from minillama.training.parallel import Parallel, processes
from minillama.training.ranks import Ranks, check_same_weights
from minillama.training.trainer import Trainer

FINE_TUNING = {"lr": 2e-3, "muon_lr": 1e-2}  # the highest learning rates of a trained model without a warning


@checked
def train(
    config: RunConfig,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    report: Report | None = None,
    objective: MakeObjective = make,
) -> int:
    """Training run from the configuration to the final model folder.

    Args:
        out: the run's folder; runs/NAME unless given.
        resume: from the newest checkpoint there.
        overwrite: replace the run there.
        verify: check the checkpoint's files against their SHA-256 before resuming.
        report: of progress; standard output unless given.
        objective: what makes the objective of configuration, model, tokenizer and data; the configured one unless
            given.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        InputError: an error that the user can correct; nothing is overwritten then.
    """
    duration = Duration()
    with processes(config) as parallel, _determinism(config.train.deterministic):
        leads = parallel.ranks.leads
        report = (report or make_report()) if leads else SilentReport()
        path = parallel.ranks.leaders(choose_folder(config.name, None if out is None else str(out)) if leads else None)
        assert path is not None
        folder = RunFolder(path, resume, overwrite, leads)
        try:
            return _train(config, folder, resume, verify, report, parallel, duration, objective)
        except KeyboardInterrupt:
            if not folder.holds_run():
                report.say("stopped before the first step; nothing was written")
            raise
        finally:
            folder.close()


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Deterministic kernels (fixed summation order) in a block."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _train(
    config: RunConfig,
    folder: RunFolder,
    resume: bool,
    verify: bool,
    report: Report,
    parallel: Parallel,
    duration: Duration,
    maker: MakeObjective,
) -> int:
    ranks, folder.log = parallel.ranks, MetricsLog(config.log)
    if ranks.leads:
        remove_parts(folder.checkpoints)
    is_asked = resume and ranks.leads
    checkpoint, passed = ranks.leaders(newest_checkpoint(folder.checkpoints, verify) if is_asked else (None, {}))
    for line in passed.values():
        report.say(f"passing over {line}")
    config = config if checkpoint is None else _as_saved(config, checkpoint)
    start = resolve(config, checkpoint is not None)
    config = start.config
    if resume and checkpoint is None:
        report.say(f"no complete checkpoint in {folder.checkpoints}: starting at step 0")
    own = None if maker is make else getattr(maker, "__qualname__", type(maker).__qualname__)
    changes = [] if checkpoint is None else _compare(checkpoint, config, folder, report, own)
    is_finished = checkpoint is not None and checkpoint.step >= config.train.steps and not config.train.minutes
    if checkpoint is not None and is_finished and folder.model.exists():
        report.say(f"{folder.path} is finished: {checkpoint.step} of {config.train.steps} steps. Next:")
        next_commands.say_next(folder, config, report, start.initial)
        return 0
    _check_resources(start, folder, report, parallel)
    if start.initial is not None and checkpoint is None:
        _warn_of_rates(config, report)
    with ranks.leader_first():  # who tokenizes the text into the cache
        data, tokenizer = load_data(config, start.tokenizer, report)
        stages, tokenizer = load_stages(config, tokenizer, report)
    model = start.build_model(parallel)
    saved = ModelFolder(model, tokenizer, start.initial if config.lora else None)
    objective = make_staged(config, model, tokenizer, data, stages, maker)
    _check_same_data(objective.fingerprint, ranks)
    trainer = Trainer(config, start.dtype, objective, saved, folder, report, checkpoint, parallel, duration)
    if any(line.startswith("validate.tokens") for line in changes):
        trainer.writer.losses.clear()  # losses of other text do not compare
    check_same_weights({**trainer.masters, **objective.companions}, ranks)
    state, before = trainer.state, trainer.state.seconds
    begun = provenance(config, state.step, state.fingerprints, start.device)
    begun |= {"processes": parallel.sizes._asdict(), PYTHON_OBJECTIVE: own, "left_out": data.skipped.record()}
    folder.start(tomli_w.dumps(to_table(config)), begun)
    set_aside(passed if ranks.leads else ())
    if checkpoint is None:
        folder.rewind_metrics(-1)
    if ranks.leads:
        folder.log.open(folder.path, to_table(config), state.step)
    _say_begin(trainer)
    if checkpoint is not None:
        report.say(f"resuming at step {checkpoint.step}")
    try:
        trainer.train()
    except Interrupted as stopped:
        _say_stopped(stopped, state.step, config, folder, report)
        return 128 + stopped.number
    if not ranks.leads:
        return 0
    _say_end(trainer, folder, before, report)
    _say_next(trainer, tokenizer, folder, start.initial, report)
    return 0


def _check_resources(start: Start, folder: RunFolder, report: Report, parallel: Parallel) -> None:
    """Refuse a disk that is too full; say what memory may not suffice, and why `auto` chose its mesh."""
    config = start.config
    check_disk(config, folder.path)
    warn_of_memory(config, start.dtype, start.device, report, parallel.sizes)
    if config.parallel.auto and parallel.ranks.processes > 1:
        need = peak_memory(config, start.dtype, start.device, parallel.sizes)
        report.say(_why(parallel, need))


def _check_same_data(fingerprint: str, ranks: Ranks) -> None:
    if ranks.leaders(fingerprint) != fingerprint:
        what, fix = "this process reads other data than the first one", "give all machines the same files"
        raise InputError(what, where="data.sources", found=f"fingerprint {fingerprint[:16]}", fix=fix)


def _why(parallel: Parallel, need: int) -> str:
    """Why `parallel.auto` chose its mesh, which needs so many bytes."""
    chosen, free = parallel.sizes, f"{parallel.free / GIB:.2f} GiB per process"
    if need <= parallel.free:
        return f"auto: {chosen}, the least division that fits in {free}"
    return f"auto: {chosen}, which needs the least: {need / GIB:.2f} GiB, more than the {free} that are free"


def _say_next(
    trainer: Trainer, tokenizer: Tokenizer, folder: RunFolder, initial: ModelFile | None, report: Report
) -> None:
    """The next commands, with the first prompt of the samples."""
    prompts = [*trainer.config.sample.prompts, *(tokenizer.decode(ids) for ids in trainer.objective.prompts)]
    best = trainer.writer.best if trainer.writer.best != trainer.state.step else None
    prompt = " ".join(prompts[0].rstrip("\ufffd").split()) if prompts else ""  # perhaps cut within a character
    next_commands.say_next(folder, trainer.config, report, initial, prompt, best)


def _say_begin(trainer: Trainer) -> None:
    config, parallel, folder, shape = trainer.config, trainer.parallel, trainer.folder, trainer.config.model
    widths = f"{shape.n_layers} layer{'s' * (shape.n_layers > 1)} {shape.dim} wide, feed-forward {shape.hidden_dim}"
    count = parallel.ranks.processes
    trainer.report.say(
        f"{config.name}: {shape.num_params() / 1e6:.2f}M parameters ({widths}), {trainer.model.device.type}, "
        f"{str(trainer.dtype).removeprefix('torch.')}, peak {trainer.peak / 1e9:.0f} GFLOP/s, "
        f"{config.train.batch_size} x {config.context} tokens per step, in {folder.path}"
        + (f", {count} processes: {parallel.sizes}" if count > 1 else "")
    )


def _warn_of_rates(config: RunConfig, report: Report) -> None:
    """Warn of learning rates that suit random weights, where a model is to be trained on."""
    rates = {f"optim.{name}": getattr(config.optim, name) for name in FINE_TUNING}
    if config.lora is None and any(rates[f"optim.{name}"] > highest for name, highest in FINE_TUNING.items()):
        now = " and ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate)
        tenth = " ".join(f"--{name} {rate / 10:g}" for name, rate in rates.items() if rate)
        report.say(f"warning: {now} suit random weights, and a trained model forgets; a tenth of them: {tenth}")


def _compare(
    checkpoint: Checkpoint, config: RunConfig, folder: RunFolder, report: Report, own: str | None
) -> list[str]:
    """Comparison of the checkpoint's run with the resumed one; the changed settings, as reported.

    Its objective is `own`, one of Python code, or that of the configuration.
    """
    _check_shape(checkpoint, config.model)
    for start in read_lines(folder.starts)[-1:]:
        was, is_known = start.get(PYTHON_OBJECTIVE), PYTHON_OBJECTIVE in start
        if is_known and (was is None) != (own is None):
            expected = f"objective={was}" if was else "that of its config.toml"
            what, fix = "the run has another objective", "call train(..., resume=True) with the one that it began with"
            raise InputError(what, where=folder.path, found=own or "none in Python", expected=expected, fix=fix)
        if was != own:
            report.say(f"warning: resuming with objective={own}; the run's was {was or 'not recorded'}")
    saved = replace(load_run_config(str(folder.config)), model=config.model)  # its shape was checked
    changes = check_resumed(saved, config, folder.config)
    steps, done = config.train.steps, checkpoint.step
    if config.train.minutes:
        return changes
    if steps < done:
        what, fix = "the run is past these steps", f"give {done} or more, or start a new run"
        raise InputError(what, where="train.steps", found=steps, expected=f"at least {done}", fix=fix)
    for line in changes:
        report.say(f"resuming with {line}")
    before = learning_rate(saved.optim_at(done), min(done + 1, saved.train.steps), saved.train.steps)
    after = learning_rate(config.optim_at(done), done + 1, steps)
    if done < steps and after > 1.2 * before:
        report.say(f"resuming with a learning rate of {after:.2g}, after {before:.2g}: that of a run of {steps} steps")
    return changes


def _say_stopped(stopped: Interrupted, step: int, config: RunConfig, folder: RunFolder, report: Report) -> None:
    report.say(f"stopped by {stopped}; {f'saved at step {step}' if step else 'no step was taken'}. To go on:")
    report.say(f"  {shlex.join(next_commands.resume(folder))}")
    if step and config.lora is None:
        ways = next_commands.uses(config, str(folder.path)).values()
        report.say(f"or to try what there is: {shlex.join(next(iter(ways)))}")


def _say_end(trainer: Trainer, folder: RunFolder, before: float, report: Report) -> None:
    """Summary of a finished run, which had taken `before` seconds when it was resumed."""
    records = read_metrics(folder.metrics)
    report.say(f"loss {sparkline([r['loss'] for r in records if r.get('loss') is not None])}")
    if trainer.guard.skipped:
        report.say(f"{trainer.guard.skipped} steps were skipped; metrics.jsonl names them")
    best = trainer.writer.best
    if best is not None:
        (name, direction), value = trainer.objective.best, trainer.writer.losses[best]
        value = value if direction == "min" else -value
        report.say(f"best {name} {value:.4f}: {folder.checkpoints / f'step-{best}'}")
    if write_png(folder.path / "loss.png", records):
        report.say(f"plot: {folder.path / 'loss.png'}")
    else:
        report.say(f"no plot without matplotlib: {MISSING}, then minillama show {folder.path} --png")
    earlier = f" ({before:.0f} s before it was resumed)" if before else ""
    report.say(f"finished in {trainer.state.seconds - before:.0f} s{earlier}. Next:")


def _as_saved(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """Resumed run: one that started from a model takes the checkpoint's shape and, if need be, tokenizer."""
    if not config.train.init_from:
        return config
    path = config.tokenizer.path if Path(config.tokenizer.path).exists() else str(checkpoint.path)
    tokenizer = replace(config.tokenizer, path=path)
    return replace(config, model=ModelConfig.load(checkpoint.path), tokenizer=tokenizer)


def _check_shape(checkpoint: Checkpoint, wanted: ModelConfig) -> None:
    saved = ModelConfig.load(checkpoint.path)
    if saved.to_hf() != wanted.to_hf():
        changed = differences({"model": to_dict(saved)}, {"model": to_dict(wanted)})
        raise InputError(
            "the checkpoint's model has another shape",
            where=checkpoint.path,
            found="; ".join(line for key, line in changed.items() if key != "model.preset"),
            fix="leave the model's settings as they were, or start a new run",
        )
