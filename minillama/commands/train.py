"""Train a model from a configuration: python train.py [CONFIG] [--section.field VALUE ...].

CONFIG is the name of a file in configs/train or a path; it comes first, and is `tiny` unless given. Every field
below can stand in the file, as field = value under [section], or on the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minillama.command_line import take_flag, take_option
from minillama.errors import InputError
from minillama.training.config import RunConfig, load_run_config

__all__ = ["Args", "parse", "run"]


@dataclass(frozen=True)
class Args:
    """What the command line said."""

    run: RunConfig = field(default_factory=RunConfig)
    out: str | None = None
    """Output folder; runs/NAME, runs/NAME-2 ... unless given."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    overwrite: bool = False
    """Replace the run in --out."""


def parse(argv: Sequence[str]) -> Args:
    """Read the command line: defaults, then the model preset, then the file, then the options.

    Raises:
        InputError: an option or value that is not understood.
    """
    words = list(argv)
    if "--help" in words or "-h" in words:
        _print_help()
        raise SystemExit(0)
    resume, overwrite = take_flag(words, "resume"), take_flag(words, "overwrite")
    out, preset = take_option(words, "out"), take_option(words, "model.preset")
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other", where="command line")
    given = words.pop(0) if words and not words[0].startswith("-") else None
    if resume and out is None:
        raise InputError("--resume needs --out", where="command line", fix="name the run's folder with --out")
    saved = Path(out) / "config.toml" if out is not None else None
    if given is None and resume and saved is not None and saved.is_file():
        given = str(saved)
    return Args(load_run_config(given or "tiny", words, preset), out, resume, overwrite)


def _print_help() -> None:
    import tyro

    options = """

--out DIR: the run's folder, runs/NAME unless given. --resume: go on from the newest checkpoint in --out.
--overwrite: replace the run in --out. --model.preset NAME: take the shape from configs/model."""
    tyro.cli(RunConfig, args=["--help"], prog="train.py [CONFIG]", description=(__doc__ or "") + options)


def run(args: Args) -> int:
    """Train; print what to do next."""
    from minillama.training.run import train

    return train(args.run, args.out, args.resume, args.overwrite)
