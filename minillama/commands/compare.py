"""Comparison of runs: configuration differences, metrics, held-out losses step by step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from minillama.errors import InputError

FIGURES = (
    "state",
    "steps",
    "tokens",
    "seconds",
    "tokens_per_second",
    "loss",
    "val_loss",
    "best_val_loss",
    "skipped_steps",
)


@dataclass(frozen=True)
class Args:
    """Command-line arguments."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folders, two or more."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def run(args: Args) -> int:
    """Print tables."""
    from minillama.runs.diff import flat
    from minillama.runs.record import RecordedRun

    if len(args.paths) < 2:
        raise InputError("there is nothing to compare with", where="command line", fix="name two runs or more")
    runs = [RecordedRun.open(path) for path in args.paths]
    tables = [flat(found.config) | {"data fingerprint": _last(found.starts, "data")} for found in runs]
    keys = [key for key in dict.fromkeys(key for table in tables for key in table) if _differs(tables, key)]
    summaries = [found.summary() for found in runs]
    curves = [dict(found.curve("val_loss")) for found in runs]
    if args.json:
        changed = {key: [table.get(key) for table in tables] for key in keys}
        points = [sorted(curve.items()) for curve in curves]
        print(json.dumps({"runs": summaries, "differences": changed, "val_loss": points}))
        return 0
    names = [str(path) for path in args.paths]
    rows = [(key, *(_plain(table.get(key)) for table in tables)) for key in keys]
    _show("configuration", names, rows or [("no differences", *[""] * len(runs))])
    _show("metrics", names, [(key, *(_plain(summary[key]) for summary in summaries)) for key in FIGURES])
    steps = sorted(set().union(*curves))
    every = max(1, -(-len(steps) // 20))
    shown = [step for i, step in enumerate(steps) if i % every == 0 or step == steps[-1]]
    _show("val_loss at step", names, [(str(s), *(_plain(curve.get(s)) for curve in curves)) for s in shown])
    _draw(
        {
            f"{chr(97 + i)}: {name}": sorted(curve.items())
            for i, (name, curve) in enumerate(zip(names, curves, strict=True))
        }
    )
    return 0


def _differs(tables: list[dict[str, Any]], key: str) -> bool:
    return any(table.get(key) != tables[0].get(key) for table in tables[1:])


def _last(starts: list[dict[str, Any]], key: str) -> str | None:
    return str(starts[-1][key])[:16] if starts else None


def _plain(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _show(title: str, names: list[str], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table, "", sep="\n")


def _draw(curves: dict[str, list[tuple[int, float]]]) -> None:
    from minillama.runs.plot import chart

    print(chart(curves))
