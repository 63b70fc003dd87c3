"""Table of finished runs for a scaling-law fit: from run folders or a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.files import parsing, read_text
from minillama.scaling.laws import BITS, NATS

if TYPE_CHECKING:
    from minillama.runs.record import RecordedRun

COUNTS = {"head": "matrices and head, no embedding", "all": "all parameters", "matrices": "matrices of the blocks"}
COLUMNS = {
    "params": ("params", "parameters", "n", "model size"),
    "tokens": ("tokens", "training tokens", "d"),
    "flops": ("flops", "flop", "training flop", "training flops", "c"),
    "loss": ("loss", "val_loss", "l"),
    "name": ("name", "run"),
}


@dataclass(frozen=True)
class Point:
    """Finished run.

    Args:
        name: of the run.
        params: N, by the count that the fit is for.
        tokens: D, training tokens.
        flops: C, training FLOPs.
        loss: held-out loss, in the table's unit.
        counts: N by each of `COUNTS`, where the shape is known.
        measures: val_loss and val_bits_per_byte, where they are known.
    """

    name: str
    params: float
    tokens: float
    flops: float
    loss: float
    counts: tuple[float, ...] = ()
    measures: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """Runs of one fit.

    Args:
        unit: of their loss.
        notes: what was left out or makes the fit doubtful.
    """

    points: tuple[Point, ...]
    unit: str = NATS
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> list[float]:
        """Values of a field of every run."""
        return [getattr(point, name) for point in self.points]

    def counted(self, count: str) -> Table:
        """The same runs with N by another of `COUNTS`."""
        index = list(COUNTS).index(count)
        return replace(self, points=tuple(replace(point, params=point.counts[index]) for point in self.points))

    def without_highest(self, drop: int) -> Table:
        """Runs whose loss is below the `drop`-th highest (Epoch's rule: 5 of 245)."""
        if not drop:
            return self
        if drop >= len(self.points):
            raise InputError(
                "no run would be left", where="--drop", found=drop, expected=f"less than {len(self.points)}"
            )
        bound = sorted(self.column("loss"))[-drop]
        kept = tuple(point for point in self.points if point.loss < bound)
        note = f"{len(self.points) - len(kept)} runs with a loss of {bound:.6g} or more were left out (--drop {drop})"
        return replace(self, points=kept, notes=(*self.notes, note))


def counts(config: ModelConfig) -> dict[str, int]:
    """Parameters of a shape by each of `COUNTS`; the first is the N of the fits.

    With the embedding counted, exponents at small sizes are those of the embedding (nanochat, dev/LOG.md).
    """
    layer = sum(map(math.prod, config.layer_tensors().values()))
    return {"head": config.num_params(embedding=False), "all": config.num_params(), "matrices": config.n_layers * layer}


Unit = Literal["nats", "bits"]
UNITS: dict[Unit, str] = {"nats": NATS, "bits": BITS}


def read_csv(path: Path, unit: Unit = "nats") -> Table:
    """Table of a CSV file with a header: loss, and two of params, tokens, flops (C = 6ND gives the third).

    Args:
        unit: that the losses are in.

    Raises:
        InputError: no rows, a missing column, or a value that is not a positive number; with the line.
    """
    with parsing(path, "the table cannot be read"):
        rows = list(csv.reader(io.StringIO(read_text(path), newline="")))
    header = [name.strip().lower() for name in rows[0]] if rows else []
    columns = {
        name: next((header.index(word) for word in words if word in header), None) for name, words in COLUMNS.items()
    }
    sizes = [name for name in ("params", "tokens", "flops") if columns[name] is not None]
    if columns["loss"] is None or len(sizes) < 2:
        expected = "loss, and two of params, tokens, flops"
        found, fix = f"{', '.join(header):.100}" or "nothing", "the first line names the columns, with commas between"
        raise InputError("columns are missing", where=path, found=found, expected=expected, fix=fix)
    points = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        value = {size: _number(row, columns[size], f"{path}:{number}, {size}") for size in (*sizes, "loss")}
        params, tokens, flops = (value.get(size, 0.0) for size in ("params", "tokens", "flops"))
        params = params or flops / 6 / tokens
        tokens = tokens or flops / 6 / params
        name = "".join(row[columns["name"] :][:1]) if columns["name"] is not None else f"line {number}"
        points.append(Point(name, params, tokens, flops or 6 * params * tokens, value["loss"]))
    if not points:
        raise InputError("there are no runs in the table", where=path, found="a header alone")
    return Table(tuple(points), UNITS[unit])


def _number(row: Sequence[str], column: int | None, where: str) -> float:
    word = row[column] if column is not None and column < len(row) else ""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError("not a positive number", where=where, found=repr(word))
    return value


def read_runs(paths: Sequence[Path], unit: Unit = "nats") -> Table:
    """Table of run folders, and of those in the folders named; FLOPs by `ModelConfig.flops_per_token`.

    A run that was not finished, or started from another model, is left out with a note.

    Args:
        paths: run folders, or folders of run folders.
        unit: of the loss: nats per token, or bits per byte, which compare between tokenizers.

    Raises:
        InputError: a folder without finished runs; runs on different data, or with other tokenizers unless `unit` is
            bits.
    """
    from minillama.runs.record import DAMAGED, RecordedRun

    folders = {folder.resolve(): folder for path in paths for folder in _folders(path)}
    runs, points, notes = [], [], []
    for run in map(RecordedRun.open, folders.values()):
        with parsing(run.path, DAMAGED):
            if reason := _unusable(run):
                notes.append(f"{run.path.name} was left out: {reason}")
                continue
            runs.append(run)
            points.append(_point(run, unit))
            notes += [f"{run.path.name}: {note}" for note in _doubts(run)]
    where = ", ".join(map(str, paths))
    if not runs:
        raise InputError("there is no finished run", where=where, found="; ".join(notes))
    with parsing(where, DAMAGED):
        _check_alike(runs, unit)
    return Table(tuple(points), UNITS[unit], tuple(notes))


def _folders(path: Path) -> Iterator[Path]:
    inside = sorted(file.parent for file in path.glob("*/config.toml")) if path.is_dir() else []
    yield from inside if inside and not (path / "config.toml").exists() else [path]


def _unusable(run: RecordedRun) -> str | None:
    if not run.is_finished:
        return f"{run.state}, and its learning rate has not decayed"
    if run.config["train"].get("init_from"):
        return "it started from another model's weights"
    measured = run.curve("val_bits_per_byte")
    if not measured or measured[-1][0] != run.step:
        return "no held-out loss of its last step is recorded"
    return None if math.isfinite(measured[-1][1]) else f"its held-out loss is {measured[-1][1]}"


def _doubts(run: RecordedRun) -> Iterator[str]:
    rates = [rate for _, rate in run.curve("lr")]
    if rates and rates[-1] > max(rates) / 2:
        yield "the learning rate did not decay to half of its peak, which biases the loss upwards"
    if run.skipped:
        yield f"{len(run.skipped)} steps were skipped"


def _check_alike(runs: Sequence[RecordedRun], unit: str) -> None:
    """Refuse losses that do not compare."""

    def names(key: Callable[[RecordedRun], Any]) -> list[str]:
        """One run of each different value."""
        return list({repr(key(run)): run.path.name for run in reversed(runs)}.values())

    objectives = names(lambda run: run.config.get("objective", {}).get("name", "lm"))
    if len(objectives) > 1:
        raise InputError("the runs have different objectives", found=", ".join(objectives))
    tokenizers, texts = names(lambda run: run.starts[-1]["tokenizer"]), names(lambda run: run.starts[-1]["data"])
    sources = names(lambda run: (run.config["data"]["sources"], run.config["data"]["val_fraction"]))
    measured = names(lambda run: (_context(run), run.config["validate"]["tokens"]))
    if len(sources) > 1 or (len(texts) > 1 and len(tokenizers) == 1):
        raise InputError("the runs were trained on different data", found=", ".join((sources + texts)[:4]))
    if len(tokenizers) > 1 and unit == "nats":
        fix = "compare bits per byte: --loss bits"
        raise InputError("the runs have different tokenizers", found=", ".join(tokenizers), fix=fix)
    if len(measured) > 1:
        expected = "one train.context and one validate.tokens"
        raise InputError("the held-out losses are of different text", found=", ".join(measured), expected=expected)


def _context(run: RecordedRun) -> int:
    return int(run.config["train"].get("context") or run.config["model"]["max_seq_len"])


def _point(run: RecordedRun, unit: str) -> Point:
    shape = {key: value for key, value in run.config["model"].items() if key != "preset"}
    config, last = ModelConfig.from_table(shape), run.records[-1]
    by_count = tuple(float(count) for count in counts(config).values())
    tokens, measures = float(last["tokens"]), (last["val_loss"], last["val_bits_per_byte"])
    flops = tokens * config.flops_per_token(_context(run))
    return Point(run.path.name, by_count[0], tokens, flops, measures[unit == "bits"], by_count, measures)
