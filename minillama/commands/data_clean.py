"""Cleaning: a pipeline of steps over sources, from a crawl to a corpus."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from minillama.commands.tables import print_table
from minillama.config.loader import check, config_names
from minillama.data.cleaning.pipeline import Pipeline
from minillama.data.cleaning.run import Cleaning
from minillama.data.sources import CLEANED, UNFINISHED
from minillama.errors import InputError
from minillama.files import remove

DEFAULT = "english"


@dataclass(frozen=True)
class Clean:
    """Clean text: read, measure, rewrite, remove duplicates, as a pipeline says. The output is a training source."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG|SOURCE")]
    """A pipeline, a .toml file or a name in configs/data (english unless given), and sources, in place of its own."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Output folder. If it holds the unfinished work of the same cleaning, that goes on."""
    workers: int = field(default=0, metadata={"min": 0})
    """Processes; 0: one per core."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Remove what a cleaning left in the output folder."""

    def run(self) -> int:
        """Clean."""
        check(self)
        pipeline = self._pipeline()
        if self.overwrite and any((self.output / name).exists() for name in (CLEANED, UNFINISHED)):
            for path in self.output.iterdir():
                remove(path)
        if (self.output / CLEANED).exists():
            raise InputError("this folder holds a finished cleaning", where=self.output, fix="add --overwrite")
        made = Cleaning(pipeline, self.output).run(self.workers or _cores(), _progress)
        _show(made)
        print(f"{made['documents']:,} documents; see {self.output}/report.html; train.py --data.sources {self.output}")
        return 0

    def _pipeline(self) -> Pipeline:
        names = [word for word in self.words if word.endswith(".toml") or word in config_names("data")]
        if len(names) > 1:
            raise InputError("more than one pipeline", where="command line", found=" ".join(names))
        pipeline = Pipeline.load(*names or [DEFAULT])
        sources = [word for word in self.words if word not in names]
        pipeline = pipeline.with_sources(tuple(sources)) if sources else pipeline
        if not pipeline.sources:
            fix = "name files or folders behind it"
            raise InputError("this pipeline has no sources", where="command line", fix=fix)
        return pipeline


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress(what: str, share: float) -> None:
    end = "\r" if sys.stderr.isatty() and share < 1 else "\n"
    if share in (0, 1) or sys.stderr.isatty():
        print(f"{share:4.0%} {what}", end=end, file=sys.stderr, flush=True)


def _show(made: dict[str, Any]) -> None:
    rows, read = [], max(made["steps"][0]["documents"], 1)
    for number, row in enumerate(made["steps"], -1):
        reason, count = max(row["removed"].items(), key=lambda item: item[1], default=("", 0))
        seconds, share = made["seconds"].get(number, 0.0), f"{row['documents'] / read:.1%}"
        rate = f"{row['seen'] / seconds:,.0f}" if seconds > 0.001 else ""
        why = f"{count:,} {reason}" if count else ""
        rows.append([row["step"], f"{row['documents']:,}", share, f"{row['bytes']:,}", rate, why])
    print_table("after step", ["documents", "share", "bytes", "docs/s", "mostly removed"], rows)
