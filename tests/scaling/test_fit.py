"""The three approaches: Epoch's fit to six digits, the known biases on exact losses, and what cannot be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from minillama.errors import InputError
from minillama.scaling import parametric
from minillama.scaling.fit import fit
from minillama.scaling.isoflop import budgets, envelope, parabolas
from minillama.scaling.laws import Law
from minillama.scaling.points import Point, Table

EPOCH = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
CHINCHILLA = Law.load("chinchilla")
BUDGETS = np.geomspace(6e18, 3e21, 9)
FIXED = np.geomspace(70e6, 10e9, 20)


def point(law: Law, params: float, flops: float) -> Point:
    return Point("", params, flops / 6 / params, flops, law.loss(params, flops / 6 / params))


def grid(law: Law, sizes: Callable[[float], Sequence[float]], flops: Sequence[float] = BUDGETS) -> Table:
    return Table(tuple(point(law, float(n), float(c)) for c in flops for n in sizes(c)))


def around(law: Law, factor: float, count: int = 11) -> Callable[[float], Sequence[float]]:
    return lambda flops: law.optimum(flops)[0] * np.geomspace(1 / factor, factor, count)


def objective(table: Table) -> parametric.Objective:
    return parametric.Objective(*(np.array(table.column(name)) for name in ("params", "tokens", "loss")))


def test_epochs_rows(epoch: Table) -> None:
    assert len(epoch.points) == 240 and "5 runs" in epoch.notes[0]
    ranges = {"params": (5.733e7, 1.6183e10), "tokens": (8.187e8, 3.1775e11), "flops": (1.397e18, 1.2956e22)}
    for name, expected in ranges.items():
        column = epoch.column(name)
        assert (min(column), max(column)) == pytest.approx(expected, rel=2e-4)
    assert (min(epoch.column("loss")), max(epoch.column("loss"))) == pytest.approx((2.0774, 3.4059), abs=5e-5)


def test_epochs_optimum_to_six_digits(epoch: Table) -> None:
    law = fit(epoch, 3, resamples=0).law
    assert law is not None
    assert [f"{value:.6g}" for value in (law.A, law.B, law.E)] == ["477.826", "2143.42", "1.81722"]
    assert (law.alpha, law.beta) == pytest.approx((0.34731, 0.36717), abs=5e-6)
    assert law.exponents()[0] == pytest.approx(0.5139, abs=5e-5)
    found = parametric.fit(objective(epoch))
    assert found.objective[0] == pytest.approx(0.001018274018, rel=1e-9)


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (Law(1.69, 406.4, 410.7, 0.34, 0.28), 0.00412101),
        (CHINCHILLA, 0.00123116),
        (Law(1.8172355, 477.8417, 2143.8638, 0.3473127, 0.3671826), 0.0010182740346),
    ],
)
def test_objective_of_published_constants(epoch: Table, law: Law, expected: float) -> None:
    theta = np.array([[math.log(law.E), math.log(law.A), math.log(law.B), law.alpha, law.beta]])
    sum_of_losses = objective(epoch)
    value = sum_of_losses.value(sum_of_losses.residuals(theta)[0], np.ones((1, 240)))
    assert value[0] == pytest.approx(expected, rel=5e-6)


def test_epochs_intervals(epoch: Table) -> None:
    """Their 4,000 resamples; 200 of ours are within a fifth of their widths."""
    found = fit(epoch, 3, resamples=200)
    published = {
        "A": (285, 744),
        "B": (1042, 5810),
        "E": (1.769, 1.871),
        "alpha": (0.317, 0.373),
        "beta": (0.331, 0.415),
    }
    for name, (low, high) in published.items():
        assert found.intervals[name] == pytest.approx((low, high), abs=(high - low) / 5), name
    low, high = found.intervals["a"]
    assert (high - low) / 2 / 1.96 == pytest.approx(0.020, abs=0.003)  # their standard error
    assert found.law is not None and found.law.residual == pytest.approx(0.00755, abs=1e-5)


def test_the_mean_ends_where_the_sum_does(epoch: Table) -> None:
    """With the mean, an optimizer that looks at the decrease of the objective stops early: alpha 0.263, beta 2.000."""
    start = np.array([[0.5, 5.0, 10.0, 0.5, 0.5]])
    for weight in (1.0, 1 / 240):
        found = parametric.minimize(objective(epoch), start, np.full((1, 240), weight))
        assert found.objective[0] / weight == pytest.approx(0.001018274018, rel=1e-7)
        assert found.theta[0, 3:] == pytest.approx((0.34731, 0.36717), abs=1e-5)


def test_a_fit_that_stops_early_is_refused(epoch: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parametric, "ITERATIONS", 3)
    with pytest.raises(InputError, match="did not converge"):
        fit(epoch, 3)


def test_derivatives() -> None:
    table = grid(EPOCH, around(EPOCH, 3, 4), BUDGETS[:3])
    huber, weights = objective(table), np.array([[1.0, 2, 0, 1, 3, 1, 1, 0, 1, 2, 1, 1]])
    theta = np.array([[0.593, 6.178, 7.643, 0.3478, 0.3658]])
    residuals, shares = huber.residuals(theta)
    delta = float(np.median(np.abs(residuals)))
    gradient, hessian, _ = huber.derivatives(residuals, shares, weights, delta)
    steps = 1e-6 * np.eye(5)

    def at(moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        r, s = huber.residuals(moved)
        return huber.value(r, weights, delta), huber.derivatives(r, s, weights, delta)[0]

    for k in range(5):
        (up, slope_up), (down, slope_down) = at(theta + steps[k]), at(theta - steps[k])
        assert gradient[0, k] == pytest.approx((up - down)[0] / 2e-6, rel=1e-4)
        assert hessian[0, k] == pytest.approx((slope_up - slope_down)[0] / 2e-6, rel=1e-4, abs=1e-9)


def test_no_power_overflows() -> None:
    huber = objective(grid(EPOCH, around(EPOCH, 3)))
    with np.errstate(all="raise", under="ignore"):
        residuals, _ = huber.residuals(np.array([[-1.0, 800.0, 25.0, 0.0, 2.0]]))
    assert np.isfinite(residuals).all()


def test_exact_losses_give_their_constants_back() -> None:
    law = fit(grid(CHINCHILLA, around(CHINCHILLA, 4)), 3, resamples=0).law
    assert law is not None
    found = [law.E, law.A, law.B, law.alpha, law.beta]
    assert found == pytest.approx(
        [CHINCHILLA.E, CHINCHILLA.A, CHINCHILLA.B, CHINCHILLA.alpha, CHINCHILLA.beta], rel=1e-6
    )


@pytest.mark.parametrize(
    ("law", "offsets", "fixed"),
    [
        (EPOCH, {2: 0.999, 4: 0.996, 8: 0.991, 16: 0.984}, 0.4876),
        (CHINCHILLA, {2: 1.003, 4: 1.012, 8: 1.028, 16: 1.051}, 0.4425),
    ],
    ids=["epoch", "chinchilla"],
)
def test_bias_of_isoflop_parabolas(law: Law, offsets: dict[float, float], fixed: float) -> None:
    """Centered sizes bias the intercept alone; one grid of sizes for all budgets biases the exponent."""
    for factor, offset in offsets.items():
        found = parabolas(grid(law, around(law, factor)).points)
        assert found.params[3] / law.optimum(BUDGETS[3])[0] == pytest.approx(offset, abs=6e-4)
        params, tokens, _ = found.laws()
        assert (params.exponent, tokens.exponent) == pytest.approx(law.exponents(), abs=1e-6)
        assert params(1e20) * tokens(1e20) * 6 == pytest.approx(1e20, rel=1e-6)
    table = grid(law, lambda flops: FIXED)
    assert parabolas(table.points).laws()[0].exponent == pytest.approx(fixed, abs=6e-5)
    windowed = parabolas(table.points, window=3).laws()[0].exponent
    assert windowed == pytest.approx(law.exponents()[0], abs=2e-4)


@pytest.mark.parametrize(("law", "exponent"), [(EPOCH, 0.5136), (CHINCHILLA, 0.4576)], ids=["epoch", "chinchilla"])
def test_bias_of_the_envelope(law: Law, exponent: float) -> None:
    flops = np.geomspace(6e18, 3e21, 400)
    params, tokens, _ = envelope(grid(law, lambda c: FIXED, flops).points).laws()
    assert params.exponent == pytest.approx(exponent, abs=2e-4)
    assert params.exponent + tokens.exponent == pytest.approx(1)


def test_the_least_loss_is_extrapolated() -> None:
    """Four times beyond the budgets, where the irreducible loss that the power law lacks costs up to 2 %."""
    within = grid(EPOCH, around(EPOCH, 2), BUDGETS[:4])
    every = grid(EPOCH, lambda c: FIXED, np.geomspace(6e18, 5e19, 60))
    for approach, table in ((1, every), (2, within)):
        found = fit(table, approach, resamples=0)
        beyond = 4 * max(table.column("flops"))
        assert found.loss is not None
        assert found.loss(beyond) == pytest.approx(EPOCH.loss(*EPOCH.optimum(beyond)), rel=0.02), approach


def test_epochs_budgets_by_parabolas(epoch: Table) -> None:
    """All nine budgets of the paper's Figure 3 have a minimum; Table 2 has a = 0.49 (0.462, 0.534)."""
    given = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)
    found = fit(epoch, 2, budgets=given, resamples=100)
    assert found.optima is not None and len(found.optima.params) == 9
    assert 0.462 < found.params.exponent < 0.534
    assert found.intervals["a"][0] < 0.49 < found.intervals["a"][1]
    assert any("runs belong to no budget" in note for note in found.notes)


def test_a_budget_that_has_no_minimum_is_named() -> None:
    flops = (1e20, 2e20, 4e20, 8e20, 1.6e21)

    def sizes(c: float) -> Sequence[float]:
        n = law.optimum(c)[0]
        return {1e20: [n, 2 * n], 2e20: [3 * n, 5 * n, 9 * n]}.get(c, n * np.geomspace(0.3, 3, 5))

    law = EPOCH
    table = grid(law, sizes, flops)
    hollow = [replace(p, loss=4 - p.loss) if p.flops == 4e20 else p for p in table.points]
    found = parabolas(hollow)
    assert found.flops == pytest.approx((8e20, 1.6e21))
    notes = " | ".join(found.notes)
    assert "1 budgets of fewer than three sizes: 1e+20" in notes
    assert "budget 2e+20 was left out: its minimum" in notes
    assert "budget 4e+20 was left out: its parabola has no minimum" in notes
    with pytest.raises(InputError, match="fewer than two budgets"):
        parabolas([p for p in hollow if p.flops < 1e21]).laws()


def test_a_minimum_at_the_edge_is_noted() -> None:
    losses = ((1e8, 2.99), (2e8, 3.0), (4e8, 3.0), (8e8, 3.3))
    curve = [Point("", n, 1e20 / 6 / n, 1e20, loss) for n, loss in losses]
    (note,) = parabolas(curve).notes
    assert "edge of its sizes; add smaller ones" in note


def test_the_envelope_leaves_out_what_lies_beyond_its_sizes() -> None:
    flops = np.geomspace(1e18, 1e22, 60)
    found = envelope(grid(EPOCH, lambda c: FIXED[8:13], flops).points)
    assert set(found.params) == set(FIXED[9:12])
    assert "least or greatest size" in found.notes[0]
    with pytest.raises(InputError, match="too few sizes"):
        envelope(grid(EPOCH, lambda c: FIXED[:2], flops).points)


def test_runs_of_nearly_equal_flops_are_one_budget() -> None:
    flops = [1e20, 1.1e20, 0.96e20, 2e20, 2.1e20]
    points = [Point("", 1e9, 1e9, c, 3.0) for c in flops]
    assert [len(group) for group in budgets(points)] == [3, 2]
    assert [len(group) for group in budgets(points, (1e20, 5e20))] == [3, 0]


def test_constants_that_the_runs_do_not_determine_are_flagged() -> None:
    narrow = grid(EPOCH, lambda c: [1e9, 1.5e9, 2e9], (1e20, 1.2e20, 1.4e20))
    notes = " | ".join(fit(narrow, 3, resamples=0).notes)
    assert "N varies by a factor of 2" in notes and "D varies by a factor of 2.8" in notes
    steep = Law(1.8, 482.0, 1e18, 0.35, 1.8)
    assert any("beta = 1.8 is degenerate" in note for note in fit(grid(steep, around(EPOCH, 8)), 3, resamples=0).notes)
    without = Law(1e-6, 482.0, 2085.0, 0.35, 0.36)
    assert any("irreducible" in note for note in fit(grid(without, around(EPOCH, 8)), 3, resamples=0).notes)


def test_all_approaches_count_flops_alike() -> None:
    """The parametric law has C = 6ND; where C is counted exactly its N_opt is still that of the same C."""
    points = [replace(p, flops=1.2 * p.flops) for p in grid(EPOCH, around(EPOCH, 2)).points]
    for approach in (2, 3):
        found = fit(Table(tuple(points)), approach, resamples=0)
        best = found.params(1.2e20), found.tokens(1.2e20)
        assert best == pytest.approx(EPOCH.optimum(1e20), rel=2e-3), approach


def test_a_coefficient_whose_place_e_takes_is_flagged() -> None:
    flat = Law(1.8, 482.0, 1.2, 0.35, 0.36)
    assert any("B = 1.2 is degenerate" in note for note in fit(grid(flat, around(EPOCH, 8)), 3, resamples=0).notes)


def test_losses_that_rise_with_size_are_refused() -> None:
    table = grid(EPOCH, around(EPOCH, 4))
    worse = tuple(replace(p, loss=1 + 1e-3 * p.params**0.3 + p.tokens**-0.2) for p in table.points)
    with pytest.raises(InputError, match="does not fall with N"):
        fit(Table(worse), 3, resamples=0)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(InputError, match="too few runs"):
        fit(grid(EPOCH, around(EPOCH, 2, 5), (1e20,)), 3)


def test_an_interval_needs_enough_runs() -> None:
    found = fit(grid(EPOCH, around(EPOCH, 2, 3), (1e20, 1e21)), 2, resamples=50)
    assert not found.intervals and "no interval" in found.notes[-1]
