"""Scaling-law fits by the three approaches of Hoffmann et al. 2022 (arXiv 2203.15556, §3), behind one result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minillama.errors import InputError
from minillama.scaling import parametric
from minillama.scaling.isoflop import Optima, PowerLaw, envelope, parabolas
from minillama.scaling.laws import CONSTANTS, Interval, Law
from minillama.scaling.points import Point, Table

NAMES = {1: "envelope", 2: "IsoFLOP parabolas", 3: "parametric loss"}
FEWEST = 6  # runs for five constants


@dataclass(frozen=True)
class Fit:
    """Result of one approach.

    Args:
        approach: 1, 2 or 3.
        params: N_opt as a function of C.
        tokens: D_opt as a function of C.
        intervals: 95 % bootstrap intervals by name: a, b, and of approach 3 the constants.
        notes: reasons for doubt, and what was left out.
        optima: what the power laws go through; approaches 1 and 2.
        loss: the least loss as a function of C, without an irreducible term; approaches 1 and 2.
        law: the parametric law; approach 3.
        bias: mean of ln(predicted loss / loss); approach 3.
    """

    approach: int
    params: PowerLaw
    tokens: PowerLaw
    intervals: dict[str, Interval]
    notes: tuple[str, ...]
    optima: Optima | None = None
    loss: PowerLaw | None = None
    law: Law | None = None
    bias: float = 0.0


def fit(
    table: Table,
    approach: int,
    window: float = math.inf,
    budgets: Sequence[float] = (),
    resamples: int = 200,
    seed: int = 0,
) -> Fit:
    """Fit of a table of runs.

    Args:
        approach: 1, 2 or 3.
        window: of approach 2, see `parabolas`.
        budgets: of approach 2, see `parabolas`.
        resamples: of the bootstrap; 0 leaves the intervals out.

    Raises:
        InputError: too few runs, sizes or budgets, or a fit that did not converge.
    """
    if approach == 3:
        return _parametric(table, resamples, seed)

    def find(points: Sequence[Point]) -> Optima:
        return envelope(points) if approach == 1 else parabolas(points, window, budgets)

    optima = find(table.points)
    params, tokens, loss = optima.laws()
    notes, drawn = list(optima.notes), _resampled(table.points, find, resamples, seed)
    is_enough = len(drawn) >= max(1, resamples / 2)
    if resamples and not is_enough:
        notes.append(f"no interval: only {len(drawn)} of {resamples} resamples had enough sizes and budgets")
    intervals = _intervals(("a", "b"), np.array(drawn)) if is_enough else {}
    return Fit(approach, params, tokens, intervals, tuple(notes), optima, loss)


def _resampled(
    points: Sequence[Point], find: Callable[[Sequence[Point]], Optima], count: int, seed: int
) -> list[tuple[float, float]]:
    """Exponents (a, b) of runs drawn with replacement, where they can be fitted."""
    random, found = np.random.default_rng(seed), []
    for _ in range(count):
        try:
            params, tokens, _ = find([points[i] for i in random.integers(0, len(points), len(points))]).laws()
        except InputError:
            continue
        found.append((params.exponent, tokens.exponent))
    return found


def _intervals(names: Sequence[str], drawn: parametric.Array) -> dict[str, Interval]:
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _parametric(table: Table, resamples: int, seed: int) -> Fit:
    if len(table.points) < FEWEST:
        found, expected = f"{len(table.points)} runs", f"{FEWEST} or more"
        raise InputError("too few runs for five constants", found=found, expected=expected)
    objective = parametric.Objective(*(np.array(table.column(name)) for name in ("params", "tokens", "loss")))
    theta = parametric.fit(objective).theta
    residuals = objective.residuals(theta)[0][0]
    e, log_a, log_b, alpha, beta = map(float, theta[0])
    for name, value, size in (("alpha", alpha, "N"), ("beta", beta, "D")):
        if value <= 0:
            raise InputError(f"the loss of these runs does not fall with {size}", found=f"{name} = {value:.3g}")
    drawn = _samples(objective, theta, resamples, seed)
    law = Law(
        math.exp(e),
        math.exp(log_a),
        math.exp(log_b),
        alpha,
        beta,
        unit=table.unit,
        samples=tuple(tuple(map(float, row)) for row in drawn),
        residual=float(np.sqrt((residuals**2).mean())),
        flops=(min(table.column("flops")), max(table.column("flops"))),
    )
    intervals, notes = {}, _doubts(law, table)
    if len(drawn) < resamples:
        notes.append(f"{resamples - len(drawn)} of {resamples} resamples have no optimum")
    if len(drawn):
        exponent = drawn[:, 4] / (drawn[:, 3] + drawn[:, 4])
        intervals = _intervals((*CONSTANTS, "a", "b"), np.column_stack([drawn, exponent, 1 - exponent]))
    # C = 6ND in the law: times the runs' share of it, so that C is counted as in the other approaches
    ratios = [6 * point.params * point.tokens / point.flops for point in table.points]
    unit = 6 / math.exp(sum(map(math.log, ratios)) / len(ratios))
    at_unit = (law.balance, 1 / law.balance)
    params, tokens = (PowerLaw(k / unit**x, x) for k, x in zip(at_unit, law.exponents(), strict=True))
    return Fit(3, params, tokens, intervals, tuple(notes), law=law, bias=float(residuals.mean()))


def _samples(objective: parametric.Objective, theta: parametric.Array, count: int, seed: int) -> parametric.Array:
    """(R, 5) constants of resampled runs, without those whose loss does not fall with N or D."""
    if not count:
        return np.empty((0, len(CONSTANTS)))
    drawn = parametric.bootstrap(objective, theta, count, seed)
    drawn = drawn[(drawn[:, 3:] > 0).all(1) & (drawn[:, :3] < 700).all(1)]
    return np.column_stack([np.exp(drawn[:, :3]), drawn[:, 3:]])


def _doubts(law: Law, table: Table) -> list[str]:
    """Signs that the runs do not determine the constants."""
    found = law.degenerate()
    if min(table.column("loss")) > 100 * law.E:
        found.append(f"E = {law.E:.3g}: the runs do not come near an irreducible loss")
    for name, column in (("N", table.column("params")), ("D", table.column("tokens"))):
        spread = max(column) / min(column)
        if spread < 4:
            found.append(f"{name} varies by a factor of {spread:.2g} alone, too little for an exponent")
    return found
