"""Summary of a run folder: state, figures, loss curve; with --all provenance and configuration too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minillama.commands.tables import print_pairs
from minillama.errors import InputError
from minillama.files import parsing


@dataclass(frozen=True)
class Args:
    """Command-line arguments."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, such as runs/tiny; the run may still be in progress."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object with all of it but the curve."""
    png: tyro.conf.FlagCreatePairsOff[bool] = False
    """Draw the loss curves into loss.png of the run's folder, and print its path alone."""
    all: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the provenance of every start, and every setting."""


def run(args: Args) -> int:
    """Print the summary."""
    from minillama.runs.record import DAMAGED

    with parsing(args.path, DAMAGED):
        return _show(args)


def _show(args: Args) -> int:
    from minillama.runs.diff import flat
    from minillama.runs.plot import MISSING, chart, write_png
    from minillama.runs.record import RecordedRun

    found = RecordedRun.open(args.path)
    if args.png:
        if not write_png(args.path / "loss.png", found.records):
            raise InputError("matplotlib is not installed", where="--png", fix=MISSING)
        print(args.path / "loss.png")
        return 0
    if args.json:
        print(json.dumps({"summary": found.summary(), "starts": found.starts, "config": found.config}))
        return 0
    about = {"command": found.starts[-1].get("command", "")} if found.starts and not args.all else {}
    print_pairs("", found.summary() | about)
    for number, start in enumerate(found.starts if args.all else (), 1):
        print_pairs(f"\nstart {number} of {len(found.starts)}", flat(start))
    print_pairs("\nconfiguration", flat(found.config) if args.all else {})
    for line in found.skipped[:10]:
        print(f"\nstep {line['step']} was skipped: {line['skipped']}")
    print()
    print(chart({"loss": found.curve("loss"), "val_loss": found.curve("val_loss")}))
    if found.accuracies:
        print(chart({f"{chr(97 + i)}: {name}": found.curve(name) for i, name in enumerate(found.accuracies)}))
    return 0
