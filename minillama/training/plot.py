"""The loss over the steps: a line of characters always, a PNG where matplotlib is installed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["sparkline", "write_png"]

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Values as bars, averaged down to `width` of them; the lowest is the lowest bar."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def write_png(path: Path, records: Sequence[Mapping[str, Any]]) -> bool:
    """Draw training and validation loss of metrics.jsonl's records.

    Returns:
        Whether it was drawn: false without matplotlib (`pip install 'minillama[plot]'`).
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, style in (("loss", {"alpha": 0.5, "linewidth": 1}), ("val_loss", {"marker": "o"})):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, **style)
    axes.set(xlabel="step", ylabel="nats a token", title=path.parent.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
