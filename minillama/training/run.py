"""A whole run: data, tokenizer, model, loop, and what to do next."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import tomli_w

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.tokenizer import Tokenizer
from minillama.training.checkpoint import Checkpoint, newest_checkpoint
from minillama.training.config import RunConfig, to_table
from minillama.training.data import load_data
from minillama.training.plot import sparkline, write_png
from minillama.training.report import Report, make_report
from minillama.training.run_folder import RunFolder, choose_folder
from minillama.training.start import build_model, with_grown_vocabulary
from minillama.training.trainer import Interrupted, Trainer

__all__ = ["train"]


def train(
    config: RunConfig,
    out: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> int:
    """Train from the configuration to the final model folder.

    Args:
        config: the run.
        out: its folder; runs/NAME unless given.
        resume: go on from the newest checkpoint there.
        overwrite: replace the run there.
        report: where to say what happens; standard output unless given.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        InputError: something that a person can put right; nothing is overwritten then.
    """
    report = report or make_report()
    folder = RunFolder(choose_folder(config.name, out), resume, overwrite)
    try:
        return _train(config, folder, resume, report)
    finally:
        folder.close()


def _train(config: RunConfig, folder: RunFolder, resume: bool, report: Report) -> int:
    checkpoint = newest_checkpoint(folder.checkpoints) if resume else None
    config = with_grown_vocabulary(config) if checkpoint is None else _as_saved(config, checkpoint)
    if resume and checkpoint is None:
        report.say(f"no complete checkpoint in {folder.checkpoints}: starting at step 0")
        folder.rewind_metrics(-1)
    if checkpoint is not None:
        _check_shape(checkpoint, config.model)
    if checkpoint is not None and checkpoint.step >= config.train.steps and folder.model.exists():
        report.say(f"{folder.path} is finished: {checkpoint.step} of {config.train.steps} steps. Next:")
        _say_next(folder, config, report)
        return 0
    corpus, tokenizer = load_data(config, report)
    trainer = Trainer(
        config, build_model(config, checkpoint is not None), tokenizer, corpus, folder, report, checkpoint
    )
    folder.config.write_text(tomli_w.dumps(to_table(config)), encoding="utf-8")
    report.say(
        f"{config.name}: {config.model.num_params() / 1e6:.2f}M parameters, {trainer.model.device.type}, "
        f"{str(trainer.dtype).removeprefix('torch.')}, peak {trainer.peak / 1e9:.0f} GFLOP/s, "
        f"{config.train.batch_size * config.context} tokens a step, in {folder.path}"
    )
    if checkpoint is not None:
        report.say(f"resuming at step {checkpoint.step}")
    try:
        trainer.train()
    except Interrupted as stopped:
        report.say(f"stopped by {stopped}; saved at step {trainer.progress.step}. To go on:")
        report.say(f"  {_command('train.py', '--out', folder.path, '--resume')}")
        return 128 + stopped.number
    records = folder.read_metrics()
    report.say(f"loss {sparkline([r['loss'] for r in records if 'loss' in r])}")
    if write_png(folder.path / "loss.png", records):
        report.say(f"plot: {folder.path / 'loss.png'}")
    report.say(f"finished in {trainer.progress.seconds:.0f} s. Next:")
    _say_next(folder, config, report)
    return 0


def _as_saved(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """A run that started from a model goes on with the checkpoint's shape and, if need be, its tokenizer."""
    if not config.train.init_from:
        return config
    place = config.tokenizer.path if Path(config.tokenizer.path).exists() else str(checkpoint.path)
    tokenizer = replace(config.tokenizer, path=place)
    return replace(config, model=ModelConfig.load(checkpoint.path), tokenizer=tokenizer)


def _check_shape(checkpoint: Checkpoint, wanted: ModelConfig) -> None:
    saved, asked = ModelConfig.load(checkpoint.path).to_hf(), wanted.to_hf()
    changed = [key for key in asked if saved.get(key) != asked[key]]
    if changed:
        raise InputError(
            "the checkpoint's model has another shape",
            where=checkpoint.path,
            found=", ".join(f"{key} = {saved.get(key)}" for key in changed),
            expected=", ".join(f"{key} = {asked[key]}" for key in changed),
            fix="leave the model's settings as they were, or start a new run",
        )


def _command(script: str, *words: object) -> str:
    return shlex.join(["python", script, *map(str, words)])


def _say_next(folder: RunFolder, config: RunConfig, report: Report) -> None:
    model, more = folder.model, 2 * config.train.steps
    prompt = config.sample.prompts[0] if config.sample.prompts else "The"
    words, remark = [f"{model}.gguf", "--to", "gguf"], "for llama.cpp, after pip install 'minillama[gguf]'"
    tokenizer = Tokenizer.load(model)
    if config.model.switches() or (tokenizer.pieces is None and tokenizer.pre is None):  # GGUF has no such thing
        words, remark = [f"{model}-bf16", "--to", "hf", "--dtype", "bf16"], "transformers opens the other as well"
    commands = {
        "generate": _command("generate.py", "--model", model, "--prompt", prompt),
        "resume": _command("train.py", "--out", folder.path, "--resume", "--train.steps", more),
        "export": f"{shlex.join(['minillama', 'convert', str(model), *words])}  # {remark}",
        "plan": shlex.join(["minillama", "plan", str(model)]),
    }
    for name, command in commands.items():
        report.say(f"  {name:9} {command}")
