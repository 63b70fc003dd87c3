"""Figure of scaling-law fits: IsoFLOP curves, N_opt over C, predicted against measured loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minillama.errors import InputError, optional_import
from minillama.files import replace_file
from minillama.scaling.fit import NAMES, Fit
from minillama.scaling.isoflop import budgets
from minillama.scaling.points import Table

FORMATS = (".png", ".svg", ".pdf")


def check_figure(path: Path) -> None:
    """Refuse a figure that could not be drawn, before the work.

    Raises:
        InputError: another format, or matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise InputError("no such format of figures", where="--figure", found=path.name, expected=", ".join(FORMATS))
    optional_import("matplotlib.figure", "a figure", "plot")


def draw(path: Path, table: Table, fits: dict[int, Fit], given: Sequence[float] = ()) -> None:
    """Write the figure.

    Args:
        path: .png, .svg or .pdf.
        fits: by approach.
        given: budgets, as of `isoflop.budgets`.

    Raises:
        InputError: matplotlib is not installed, or the system refuses the file.
    """
    figure = optional_import("matplotlib.figure", "a figure", "plot").Figure(figsize=(13, 4), layout="constrained")
    isoflop, size, loss = figure.subplots(1, 3)
    for group in budgets(table.points, given):
        if len(group) > 2:
            pairs = sorted((point.params, point.loss) for point in group)
            isoflop.plot(*zip(*pairs, strict=True), "o", markersize=4, label=f"{group[0].flops:.2g} FLOPs")
    flops, measured = np.array(table.column("flops")), np.array(table.column("loss"))
    line = np.geomspace(flops.min(), 4 * flops.max(), 50)
    for approach, fit in fits.items():
        label = f"{NAMES[approach]}: a = {fit.params.exponent:.3f}"
        size.plot(line, [fit.params(c) for c in line], color=f"C{approach}", label=label)
        if approach == 2 and fit.optima is not None:
            size.plot(fit.optima.flops, fit.optima.params, "o", color="C2")
            for params, curve in zip(fit.optima.params, fit.optima.parabolas, strict=True):
                x = np.linspace(-1.4, 1.4, 50) + np.log(params)
                isoflop.plot(np.exp(x), np.polyval(curve, x), color="0.6", linewidth=1)
        if fit.law is not None:
            predicted = [fit.law.loss(point.params, point.tokens) for point in table.points]
            loss.plot(measured, predicted, "o", markersize=3, label="runs")
            loss.plot([measured.min(), measured.max()], [measured.min(), measured.max()], color="0.6", label="equal")
    isoflop.set(xscale="log", xlabel="N", ylabel=table.unit, title="loss per budget")
    size.set(xscale="log", yscale="log", xlabel="C, FLOPs", ylabel="N_opt", title="compute-optimal size")
    loss.set(xlabel=f"measured, {table.unit}", ylabel="predicted", title="parametric loss")
    for axes in (isoflop, size, loss):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    replace_file(path, lambda file: figure.savefig(file, dpi=120, format=path.suffix[1:]))
