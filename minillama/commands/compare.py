"""Comparison of runs: configuration differences, metrics, held-out losses step by step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from minillama.commands.tables import plain, print_table
from minillama.errors import InputError
from minillama.files import parsing

if TYPE_CHECKING:
    from minillama.runs.record import RecordedRun


@dataclass(frozen=True)
class Args:
    """Command-line arguments."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folders, two or more."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def run(args: Args) -> int:
    """Print tables."""
    from minillama.runs.record import DAMAGED

    with parsing(", ".join(map(str, args.paths)), DAMAGED):
        return _compare(args)


def _compare(args: Args) -> int:
    from minillama.runs.diff import flat
    from minillama.runs.record import RecordedRun

    if len(args.paths) < 2:
        raise InputError("there is nothing to compare with", where="command line", fix="name two runs or more")
    runs = [RecordedRun.open(path) for path in args.paths]
    tables = [flat(found.config) | _beside(found) for found in runs]
    every = dict.fromkeys(key for table in tables for key in table)
    keys = [key for key in every if any(table.get(key) != tables[0].get(key) for table in tables)]
    summaries = [found.summary() for found in runs]
    curves = [dict(found.curve("val_loss")) for found in runs]
    if args.json:
        changed = {key: [table.get(key) for table in tables] for key in keys}
        points = [sorted(curve.items()) for curve in curves]
        print(json.dumps({"runs": summaries, "differences": changed, "val_loss": points}))
        return 0
    names = [str(path) for path in args.paths]
    rows = [_row(key, tables) for key in keys]
    print_table("configuration", names, rows or [("no differences",)])
    measures = dict.fromkeys(key for one in summaries for key in one if key not in ("run", "checkpoints"))
    print_table("metrics", names, [_row(key, summaries) for key in measures])
    for name in ["val_loss", *dict.fromkeys(name for found in runs for name in found.accuracies)]:
        _print_curves(name, names, [dict(found.curve(name)) for found in runs])
    return 0


def _beside(run: RecordedRun) -> dict[str, Any]:
    """Origins of a run that are not in its configuration."""
    from minillama.runs.record import PYTHON_OBJECTIVE

    start = run.starts[-1] if run.starts else {}
    data, objective = start.get("data"), start.get(PYTHON_OBJECTIVE)
    return {"data fingerprint": data and data[:16], PYTHON_OBJECTIVE: objective}


def _print_curves(name: str, names: Sequence[str], curves: Sequence[Mapping[int, float]]) -> None:
    """A measure step by step, as a table and a chart."""
    from minillama.runs.plot import chart

    steps = sorted(set().union(*curves))
    stride = max(1, -(-len(steps) // 20))
    shown = [step for i, step in enumerate(steps) if i % stride == 0 or step == steps[-1]]
    print_table(f"{name} at step", names, [_row(step, curves) for step in shown])
    pairs = enumerate(zip(names, curves, strict=True))
    print(chart({f"{chr(97 + i)}: {run}": sorted(curve.items()) for i, (run, curve) in pairs}))


def _row(key: Any, columns: Sequence[Mapping[Any, Any]]) -> list[str]:
    return [str(key), *("-" if column.get(key) is None else plain(column[key]) for column in columns)]
