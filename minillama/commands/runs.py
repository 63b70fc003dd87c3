"""List of runs with their best figures."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minillama.commands.tables import duration_text, plain, print_table
from minillama.errors import InputError


@dataclass(frozen=True)
class Args:
    """Command-line arguments."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Folder of the run folders."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print a JSON list of what `show` says of each."""


def run(args: Args) -> int:
    """Print a line per run, by name."""
    from minillama.runs.record import RecordedRun

    paths = sorted(path.parent for path in args.folder.glob("*/config.toml"))
    if not paths:
        found = "no runs" if args.folder.is_dir() else "no such folder"
        raise InputError("there is nothing to list", where=args.folder, found=found, fix="minillama runs DIR")
    found_runs = []
    for path in paths:
        try:
            found_runs.append(RecordedRun.open(path).summary())
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
    if args.json:
        print(json.dumps(found_runs))
        return 0
    rows = [
        (
            Path(one["run"]).name,
            one["state"].split(" ")[0],
            one["steps"],
            *("-" if one[key] is None else plain(one[key]) for key in ("best_val_loss", "best_step", "val_loss")),
            "-" if one["tokens_per_second"] is None else f"{one['tokens_per_second']:,.0f}",
            duration_text(one["seconds"]),
        )
        for one in found_runs
    ]
    print_table("run", ("", "steps", "best val_loss", "at step", "last", "tokens/s", "time"), rows)
    return 0
