"""Loss curves: sparkline and text chart always, a PNG where matplotlib is installed."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minillama.errors import printable
from minillama.files import replace_file

MISSING = "pip install 'minillama[plot]'"
BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Sparkline: values as bars, averaged down to `width` of them; the lowest is the lowest bar."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def chart(curves: Mapping[str, Sequence[tuple[int, float]]], width: int = 64, height: int = 12) -> str:
    """Text chart: curves of (step, value) on a grid of characters, each drawn with the first letter of its name.

    Args:
        curves: by name; NaN and infinite values are left out.
        width: columns of the grid.
        height: rows of the grid.
    """
    points = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    every = [point for curve in points.values() for point in curve]
    if not every:
        return "no values yet"
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))
    grid = [[" "] * width for _ in range(height)]
    for name, curve in points.items():
        for x, y in curve:
            column = round((x - left) / ((right - left) or 1) * (width - 1))
            row = round((high - y) / ((high - low) or 1) * (height - 1))
            grid[row][column] = name[0]
    edge = max(len(f"{value:.4g}") for value in (low, high))
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    lines = [f"{labels.get(i, ''):>{edge}} |{''.join(row).rstrip()}" for i, row in enumerate(grid)]
    axis = f"{'':>{edge}} +{'-' * width}"
    steps = f"{'':>{edge}}  {left}{right:>{max(1, width - len(str(left)))}}"
    legend = ", ".join(name if name[1:2] == ":" else f"{name[0]} {name}" for name in points)
    return "\n".join([*lines, axis, f"{steps}  step; {legend}"])


def write_png(path: Path, records: Sequence[Mapping[str, Any]]) -> bool:
    """Draw training and validation loss of metrics.jsonl's records, and accuracies on evaluation sets.

    Returns:
        Whether it was drawn: false without matplotlib (`pip install 'minillama[plot]'`).
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, style in (("loss", {"alpha": 0.5, "linewidth": 1}), ("val_loss", {"marker": "o"})):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, **style)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.set_title(printable(path.parent.name), parse_math=False)
    axes.legend()
    accuracies = dict.fromkeys(key for r in records for key in r if re.search(r"_acc(_norm|_pmi)?$", key))
    if accuracies:
        right = axes.twinx()
        for key in accuracies:
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            right.plot(*zip(*points, strict=True), label=key, linestyle="--", marker=".")
        right.set(ylabel="accuracy")
        right.legend(loc="lower left")
    axes.grid(alpha=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character of the run's name that the font lacks
        replace_file(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    return True
