"""Approaches 1 and 2 of Hoffmann et al. 2022 (arXiv 2203.15556, §3.1 and §3.2): envelope, and IsoFLOP parabolas.

Both find (C, N_opt, D_opt) in the runs and fit N_opt = k C^a and D_opt = k' C^b through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minillama.errors import InputError
from minillama.scaling.points import Point

GRID = 1500  # FLOP values of the envelope, as in the paper
APART = 1.5  # least factor between the largest and the smallest C for an exponent
SAME = 0.15  # of one budget in ln C


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * C^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, flops: float) -> float:
        """Value at C."""
        return float(self.coefficient * flops**self.exponent)


@dataclass(frozen=True)
class Optima:
    """Compute-optimal sizes found in the runs.

    Args:
        flops: C of each.
        params: N_opt.
        tokens: D_opt.
        losses: the least loss, at them.
        notes: budgets that were left out, and why.
        parabolas: (c2, c1, c0) of the loss in ln N per budget; approach 2 alone.
    """

    flops: tuple[float, ...]
    params: tuple[float, ...]
    tokens: tuple[float, ...]
    losses: tuple[float, ...]
    notes: tuple[str, ...] = ()
    parabolas: tuple[tuple[float, ...], ...] = ()

    def laws(self) -> tuple[PowerLaw, PowerLaw, PowerLaw]:
        """Power laws of N_opt, D_opt and the least loss, by least squares of the logarithms.

        That of the loss has no irreducible term: it holds near the budgets alone.

        Raises:
            InputError: fewer than two budgets, or too near to each other; the notes say why.
        """
        if not self.flops or max(self.flops) < APART * min(self.flops):
            raise InputError(
                "there are fewer than two budgets with a minimum",
                found="; ".join(self.notes) or f"FLOPs within a factor of {APART}",
                expected="two or more budgets, each of three or more sizes around its minimum",
            )
        columns = (self.params, self.tokens, self.losses)
        fits = (np.polyfit(np.log(self.flops), np.log(values), 1) for values in columns)
        params, tokens, loss = (PowerLaw(math.exp(offset), float(slope)) for slope, offset in fits)
        return params, tokens, loss


def envelope(points: Sequence[Point]) -> Optima:
    """Approach 1: the size with the least loss at each of 1,500 FLOP values.

    The loss of a size between its runs is interpolated linearly in ln C and ln L. Every run is a finished one: the
    losses on the way of a longer run, before its learning rate has decayed, would be too high. FLOP values at which the
    least or the greatest size wins are left out, since the best one may lie beyond.
    """
    by_size: dict[float, dict[float, Point]] = {}
    for point in points:
        by_size.setdefault(point.params, {})[point.flops] = point
    curves = [sorted(runs.values(), key=lambda run: run.flops) for _, runs in sorted(by_size.items()) if len(runs) > 1]
    if len(curves) < 3:
        found, expected = f"{len(curves)} sizes", "three or more sizes, each trained for two or more durations"
        raise InputError("the envelope has too few sizes with several runs", found=found, expected=expected)
    every = [math.log(point.flops) for point in points]
    grid = np.linspace(min(every), max(every), GRID)
    losses = np.stack([_interpolated(curve, grid) for curve in curves])
    best = np.argmin(losses, 0)
    there = np.isfinite(losses)
    first, last = there.argmax(0), len(curves) - 1 - there[::-1].argmax(0)
    inside = (best > first) & (best < last)
    note = f"{GRID - inside.sum()} of {GRID} FLOP values were left out, where the least or greatest size is the best"
    flops, ratios = np.exp(grid), [curve[0].tokens / curve[0].flops for curve in curves]
    return Optima(
        tuple(flops[inside]),
        tuple(curves[i][0].params for i in best[inside]),
        tuple(ratios[i] * c for i, c in zip(best[inside], flops[inside], strict=True)),
        tuple(np.exp(losses.min(0)[inside])),
        (note,) if not inside.all() else (),
    )


def _interpolated(curve: Sequence[Point], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    x, y = (np.log([getattr(run, name) for run in curve]) for name in ("flops", "loss"))
    return np.asarray(np.interp(grid, x, y, left=np.inf, right=np.inf))


def budgets(points: Sequence[Point], given: Sequence[float] = ()) -> list[list[Point]]:
    """Runs by budget.

    Args:
        given: budgets, each with the runs whose ln C is within 0.15; the others are not used. Without them each run
            belongs to the budget of the least C within 0.15.
    """
    if given:
        return [[point for point in points if abs(math.log(point.flops / flops)) <= SAME] for flops in given]
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.flops):
        if groups and math.log(point.flops / groups[-1][0].flops) <= SAME:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def parabolas(points: Sequence[Point], window: float = math.inf, given: Sequence[float] = ()) -> Optima:
    """Approach 2: the minimum of a parabola of the loss in ln N, for each budget.

    A parabola is symmetric and the loss is not: with sizes up to a factor f on either side of the minimum N_opt is off
    by 0.1 to 0.3 % for f = 2, by 1.6 to 5 % for f = 16. The exponent suffers only when the sizes lie around the minimum
    otherwise at each budget, as one grid of sizes for all budgets does.

    Args:
        window: only sizes within this factor of the best one.
        given: budgets, where the FLOPs of the runs do not tell them.
    """
    found, shapes, notes, thin = [], [], [], []
    groups = [group for group in budgets(points, given) if group]
    for group in groups:
        middle = math.exp(sum(math.log(point.flops) for point in group) / len(group))
        best = min(group, key=lambda point: point.loss).params
        group = [point for point in group if abs(math.log(point.params / best)) <= math.log(window) + 1e-9]
        sizes = {point.params for point in group}
        budget = f"budget {middle:.3g}"
        if len(sizes) < 3:
            thin.append(f"{middle:.3g}")
            continue
        x = np.log([point.params for point in group])
        curve = np.polyfit(x, [point.loss for point in group], 2)
        vertex = -curve[1] / (2 * curve[0])
        if curve[0] <= 0:
            notes.append(f"{budget} was left out: its parabola has no minimum")
            continue
        if not x.min() <= vertex <= x.max():
            notes.append(f"{budget} was left out: its minimum, {math.exp(vertex):.3g}, lies outside its sizes")
            continue
        if best in (min(sizes), max(sizes)):
            notes.append(f"{budget}: the least loss is at the edge of its sizes; add {_beyond(best, sizes)} ones")
        per_size = np.polyfit(x, np.log([point.tokens / point.flops for point in group]), 2)
        tokens = middle * math.exp(np.polyval(per_size, vertex))
        found.append((middle, math.exp(vertex), tokens, float(np.polyval(curve, vertex))))
        shapes.append(tuple(float(c) for c in curve))
    if thin:
        notes.append(f"no parabola for {len(thin)} budgets of fewer than three sizes: {', '.join(thin)}")
    unused = len(points) - sum(map(len, groups))
    if unused > 0:
        notes.append(f"{unused} runs belong to no budget")
    flops, params, each, losses = list(zip(*found, strict=True)) or [()] * 4
    return Optima(flops, params, each, losses, tuple(notes), tuple(shapes))


def _beyond(best: float, sizes: set[float]) -> str:
    return "smaller" if best == min(sizes) else "larger"
