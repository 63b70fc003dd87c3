"""Training of a model from a configuration: python train.py [CONFIG] [--section.field VALUE ...].

CONFIG is the name of a file in configs/train or a path; it comes first, and is `tiny` unless given. Every field
below can be set in the file, as field = value under [section], or on the command line; the defaults shown are tiny's.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from minillama.config import RopeScaling
from minillama.config.command_line import take_flag, take_option
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.runs.config import RunConfig, load_run_config
from minillama.runs.objectives import OBJECTIVES


@dataclass(frozen=True)
class Args:
    """Command-line arguments, as `--help` describes them."""

    run: RunConfig = field(default_factory=RunConfig)
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    verify: bool = True


def parse(argv: Sequence[str]) -> Args:
    """Parse the command line: defaults, then the model preset, then the file, then the options.

    Raises:
        InputError: an option or value that is not understood.
    """
    words = list(argv)
    if "--help" in words or "-h" in words:
        _print_help()
        raise SystemExit(0)
    resume, overwrite = take_flag(words, "resume"), take_flag(words, "overwrite")
    verify = not take_flag(words, "no-verify")
    words += ["--train.deterministic", "true"] if take_flag(words, "deterministic") else []
    out, preset = take_option(words, "out"), take_option(words, "model.preset")
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other", where="command line")
    given = words.pop(0) if words and not words[0].startswith("-") else None
    if resume and out is None:
        raise InputError("--resume needs --out", where="command line", fix="name the run's folder with --out")
    saved = Path(out) / "config.toml" if out is not None else None
    if given is None and resume and saved is not None:
        if not (words or preset or os.path.lexists(saved.parent)):
            fix = "look at --out, or name the CONFIG that is to be trained there"
            raise InputError("there is no run to resume", where=saved.parent, found="no such folder", fix=fix)
        given = str(saved) if os.path.isfile(saved) else None
        if given is None and (saved.parent / "config.json").is_file():
            run = next((path for path in saved.parent.absolute().parents[:2] if (path / "config.toml").is_file()), None)
            fix = f"resume its run: --out {run}" if run else f"train from it: --train.init_from {saved.parent}"
            raise InputError("this is the folder of a model, not of a run", where=saved.parent, fix=fix)
    return Args(load_run_config(given or "tiny", words, preset), out, resume, overwrite, verify)


def _print_help() -> None:
    """Tyro formats the page; the options themselves are parsed by `config/command_line.py`, for its messages' sake."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type is bool:
            return _shown("{true,false}", 1, lambda value: [str(value).lower()])
        if typing.get_args(info.type) == ("lm",):  # of the member that is shown
            return _shown(f"{{{','.join(OBJECTIVES)}}}", 1, lambda value: [value])
        if info.type == tuple[Source, ...]:
            return _shown("NAME_OR_PATH ...", "*", lambda sources: [s.name or s.path for s in sources])
        return None

    def _shown(metavar: str, count: Any, words: Any) -> PrimitiveConstructorSpec[Any]:
        return PrimitiveConstructorSpec(count, metavar, lambda args: args, lambda value: True, words)

    options = """

--out DIR: the run's folder, runs/NAME unless given. --resume: resume from the newest checkpoint in --out. --overwrite:
replace the run in --out. --model.preset NAME: take the shape from configs/model. --no-verify: do not verify the
SHA-256 of a checkpoint's files. --deterministic: as --train.deterministic true.

--objective.name chooses the other settings of that section:"""
    for name, kind in OBJECTIVES.items():
        others = [f"--objective.{f.name}" for f in fields(kind) if f.name != "name"]
        options += f"\n  {name}: {kind.__doc__} {', '.join(others)}"
    tiny = load_run_config("tiny")
    tyro.cli(
        RunConfig,
        args=["--help"],
        prog="train.py [CONFIG]",
        description=(__doc__ or "") + options,
        default=replace(tiny, model=replace(tiny.model, rope_scaling=RopeScaling())),
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        registry=registry,
    )


def run(args: Args) -> int:
    """Train; print the commands that may follow."""
    from minillama.device import bound_kernel_caches, keep_freed_pages

    bound_kernel_caches()
    keep_freed_pages()
    from minillama.training.run import train  # loads torch

    return train(args.run, args.out, args.resume, args.overwrite, args.verify)
