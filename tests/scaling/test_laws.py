"""Scaling laws against the published constants, and worked values of other people's code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from minillama.errors import InputError
from minillama.scaling.laws import Law, effective, interval, minimum, repeated_loss
from minillama.scaling.planning import optimum
from minillama.scaling.points import Table

ROUNDED = Law(1.69, 406.4, 410.7, 0.34, 0.28)
EPOCH = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
CHINCHILLA, MUENNIGHOFF = Law.load("chinchilla"), Law.load("muennighoff")


@pytest.mark.parametrize(
    ("law", "flops", "params", "tokens", "loss"),
    [
        (ROUNDED, 1e21, 1.82422e9, 9.13634e10, 2.32888),
        (ROUNDED, 5.76e23, 3.21899e10, 2.98231e12, 1.93075),
        (CHINCHILLA, 1e21, 2.21695e9, 7.51782e10, 2.29549),
        (CHINCHILLA, 5.76e23, 4.03609e10, 2.37854e12, 1.91841),  # the paper's "40B at Gopher's budget"
        (EPOCH, 1e21, 2.77846e9, 5.99853e10, 2.30553),
        (EPOCH, 5.76e23, 7.22487e10, 1.32874e12, 1.97444),
    ],
)
def test_optimum(law: Law, flops: float, params: float, tokens: float, loss: float) -> None:
    assert law.optimum(flops) == pytest.approx((params, tokens), rel=3e-6)
    assert law.loss(*law.optimum(flops)) == pytest.approx(loss, abs=6e-6)
    assert law.params_for(tokens) == pytest.approx(params, rel=1e-5)
    nearby = [law.loss(n, flops / 6 / n) for n in (0.98 * params, 1.02 * params)]
    assert min(nearby) > law.loss(*law.optimum(flops))


@pytest.mark.parametrize(
    ("law", "large", "small"),
    [(ROUNDED, 1.9366455, 2.5800479), (CHINCHILLA, 1.9208460, 2.5306682), (EPOCH, 1.9738819, 2.5300504)],
)
def test_loss(law: Law, large: float, small: float) -> None:
    assert law.loss(70e9, 1.4e12) == pytest.approx(large, abs=6e-8)
    assert law.loss(1e9, 20e9) == pytest.approx(small, abs=1e-7)


def test_exponents() -> None:
    assert CHINCHILLA.exponents() == pytest.approx((0.4565, 0.5435), abs=5e-5)
    assert Law.load("epoch").exponents()[0] == pytest.approx(0.513, abs=5e-4)


@pytest.mark.parametrize(
    ("law", "mean", "rms"), [(ROUNDED, 0.01674, 0.01925), (CHINCHILLA, -0.00302, 0.01000)], ids=["rounded", "exact"]
)
def test_rounded_constants_are_off_on_their_own_data(epoch: Table, law: Law, mean: float, rms: float) -> None:
    errors = np.array([math.log(law.loss(point.params, point.tokens) / point.loss) for point in epoch.points])
    assert (errors.mean(), np.sqrt((errors**2).mean())) == pytest.approx((mean, rms), abs=1e-5)


def test_repeated_data_is_datablations() -> None:
    """Their README's values for 25B unique tokens."""
    assert repeated_loss(MUENNIGHOFF, 6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, rel=1e-14)
    assert repeated_loss(MUENNIGHOFF, 8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, rel=1e-14)
    assert MUENNIGHOFF.balance == pytest.approx(0.2258019, rel=1e-6)
    assert MUENNIGHOFF.params_for(25e9) == pytest.approx(1.27466294e9, rel=1e-8)


@pytest.mark.parametrize(
    ("epochs", "worth"),
    [(1, 1), (2, 1.968199), (4, 3.725673), (8, 6.624119), (16, 10.582457), (40, 15.167465), (1e9, 16.387756)],
)
def test_worth_of_epochs(epochs: float, worth: float) -> None:
    assert effective(epochs * 3e9, 3e9, 15.387756) / 3e9 == pytest.approx(worth, rel=1e-6)


def test_best_split_of_repeated_data() -> None:
    """At least as good as datablations' grid search, and near to it."""
    params, tokens = optimum(MUENNIGHOFF, 1e22, 25e9)
    grid = (7_022_364_735.88, 237_336_955_477.55)
    assert (params, tokens) == pytest.approx(grid, rel=1e-3)
    assert tokens / 25e9 == pytest.approx(9.49347822, rel=1e-3)
    assert repeated_loss(MUENNIGHOFF, params, tokens, 25e9) <= repeated_loss(MUENNIGHOFF, *grid, 25e9)
    assert optimum(MUENNIGHOFF, 1e18, 25e9) == pytest.approx(MUENNIGHOFF.optimum(1e18))  # nothing is repeated


def test_more_unique_tokens_than_training_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="more unique tokens"):
        repeated_loss(MUENNIGHOFF, 1e9, 1e9, 2e9)


def test_interval_is_that_of_sampled_constants() -> None:
    law = Law.load("epoch")
    laws = [Law(*row) for row in law.samples]
    for quantity in (lambda at: at.loss(3e9, 6e10), lambda at: at.optimum(1e21)[0], lambda at: at.E):
        low, high = np.percentile([quantity(one) for one in laws], [2.5, 97.5])
        found = interval(law, quantity)
        assert found is not None
        assert np.log(found[1] / found[0]) == pytest.approx(np.log(high / low), rel=0.05)
        assert found[0] < quantity(law) < found[1]
    wider = interval(law, lambda at: at.loss(3e9, 6e10), law.residual)
    assert wider is not None and math.log(wider[1] / wider[0]) / 2 > 1.96 * law.residual
    assert interval(CHINCHILLA, lambda at: at.E) is None


def test_minimum() -> None:
    assert minimum(lambda x: math.log(x / 3e7) ** 2, 1, 1e12) == pytest.approx(3e7, rel=1e-7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("E = 1.0", "A is missing"),
        ("E = 1.0\nA = 1.0\nB = 1.0\nalpha = 0.3\nbeta = 0.3\ngamma = 1.0", "unknown key 'gamma'"),
        ("E = 1.0\nA = 1.0\nB = 1.0\nalpha = -0.3\nbeta = 0.3", "alpha is out of range"),
        ("E = 1.0\nA = 1.0\nB = 1.0\nalpha = 0.3\nbeta = 0.3\nsamples = [[1.0]]", "not five constants"),
        ("E = 1.0\nA = 1.0\nB = 1.0\nalpha = 0.3\nbeta = 0.3\nflops = [1.0]", "two values"),
    ],
)
def test_a_laws_file_is_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "law.toml").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        Law.load(str(tmp_path / "law.toml"))
    assert "law.toml" in str(error.value)
    with pytest.raises(InputError, match="did you mean 'chinchilla'"):
        Law.load("chinchila")
