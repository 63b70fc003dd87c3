"""Approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556, §3.3): a parametric loss, fitted to all runs.

The constants theta = (ln E, ln A, ln B, alpha, beta) minimize the SUM over runs of the Huber loss (delta 1e-3) of
r = LSE(ln E, ln A - alpha ln N, ln B - beta ln D) - ln L, LSE being log-sum-exp. With the mean instead of the sum the
objective changes by less than an optimizer's default tolerance long before the minimum; here the gradient decides.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minillama.errors import InputError

Array = NDArray[np.float64]

# the first is least squares; the minimum of each is the start of the next, since Newton's method needs a start near the
# kinks of the last, between which the objective is almost linear
DELTAS = [1e-3 * 2.0**i for i in range(9, -1, -1)]
STARTS = 20  # of the grid's 4,500, those with the least objective
ITERATIONS = 100  # per delta
TOLERANCE = 1e-11  # of the gradient per run and DELTAS[-1]


class Minimum(NamedTuple):
    """Minima from several starts or weightings.

    Args:
        theta: (S, 5) constants.
        objective: (S,) sums of Huber losses.
        gradient: (S,) largest component.
    """

    theta: Array
    objective: Array
    gradient: Array


class Objective:
    """Sum of Huber losses over runs, for many theta at once.

    Args:
        params: (n,) N.
        tokens: (n,) D.
        loss: (n,) L.
    """

    def __init__(self, params: Array, tokens: Array, loss: Array) -> None:
        self.log_loss = np.log(loss)
        zero, one, x, y = np.zeros_like(params), np.ones_like(params), -np.log(params), -np.log(tokens)
        # gradients of the three logarithmic terms, which are linear in theta
        terms = [(one, zero, zero, zero, zero), (zero, one, zero, x, zero), (zero, zero, one, zero, y)]
        self.terms = np.stack([np.stack(columns, -1) for columns in terms])  # (3, n, 5)
        self.squares = np.einsum("jnk,jnl->jnkl", self.terms, self.terms).reshape(-1, 25)

    def residuals(self, theta: Array) -> tuple[Array, Array]:
        """Residuals (S, n) of theta (S, 5), and the terms' shares of the predicted loss (S, 3, n)."""
        terms = (theta @ self.terms.reshape(-1, 5).T).reshape(len(theta), 3, -1)
        largest = terms.max(1, keepdims=True)  # taken out: e^25 and its powers overflow otherwise
        scaled = np.exp(terms - largest)
        total = scaled.sum(1, keepdims=True)
        return (largest + np.log(total))[:, 0] - self.log_loss, scaled / total

    def value(self, residuals: Array, weights: Array, delta: float = DELTAS[-1]) -> Array:
        """(S,) objectives of residuals (S, n) with weights (S, n) or (1, n)."""
        size = np.abs(residuals)
        huber = np.where(size <= delta, residuals**2 / 2, delta * (size - delta / 2))
        return np.asarray((weights * huber).sum(1))

    def derivatives(
        self, residuals: Array, shares: Array, weights: Array, delta: float = DELTAS[-1]
    ) -> tuple[Array, Array, Array]:
        """Gradient (S, 5), Hessian (S, 5, 5), and the squared Jacobian's diagonal (S, 5), which scales the damping."""
        jacobian = sum(shares[:, j, :, None] * self.terms[j] for j in range(3))  # (S, n, 5)
        slope = weights * np.clip(residuals, -delta, delta)
        curvature = weights * (np.abs(residuals) <= delta) - slope
        hessian = (jacobian * curvature[..., None]).swapaxes(1, 2) @ jacobian
        hessian += ((slope[:, None] * shares).reshape(len(shares), -1) @ self.squares).reshape(-1, 5, 5)
        return (slope[:, None] @ jacobian)[:, 0], hessian, (jacobian**2).sum(1)


def minimize(objective: Objective, theta: Array, weights: Array) -> Minimum:
    """Minima from each theta (S, 5) for weights (S, n) or (1, n), all at once, by falling delta."""
    for delta in DELTAS:
        found = _newton(objective, theta, weights, delta)
        theta = found.theta
    return found


def _newton(objective: Objective, theta: Array, weights: Array, delta: float) -> Minimum:
    """Damped Newton's method.

    Negative curvature is reflected, so that every step descends; a step that does not is repeated with four times the
    damping (Levenberg and Marquardt's rule).
    """
    theta, damping, size = theta.copy(), np.full(len(theta), 1e-3), np.full(len(theta), np.inf)
    weights = np.broadcast_to(weights, (len(theta), weights.shape[1]))
    for _ in range(ITERATIONS):
        left = np.flatnonzero(size >= TOLERANCE * delta * weights.shape[1])
        if not len(left):
            break
        residuals, shares = objective.residuals(theta[left])
        gradient, hessian, scale = objective.derivatives(residuals, shares, weights[left], delta)
        size[left] = np.abs(gradient).max(1)
        eigenvalues, vectors = np.linalg.eigh(hessian + (damping[left, None] * scale)[..., None] * np.eye(5))
        along = np.einsum("skl,sk->sl", vectors, gradient) / np.maximum(np.abs(eigenvalues), 1e-12)
        moved = theta[left] - np.einsum("skl,sl->sk", vectors, along)
        value = objective.value(residuals, weights[left], delta)
        better = objective.value(objective.residuals(moved)[0], weights[left], delta) < value
        theta[left[better]] = moved[better]
        damping[left] = np.clip(damping[left] * np.where(better, 0.25, 4), 1e-15, 1e8)
    residuals, _ = objective.residuals(theta)
    return Minimum(theta, objective.value(residuals, weights, delta), size)


def fit(objective: Objective) -> Minimum:
    """The best minimum (S = 1) from the grid of starts of the paper's appendix D.2.

    Raises:
        InputError: no start converged.
    """
    offsets, exponents, weights = np.arange(0, 26, 5), np.arange(0, 2.1, 0.5), np.ones((1, len(objective.log_loss)))
    grid = np.array(list(product(np.arange(-1, 1.1, 0.5), offsets, offsets, exponents, exponents)), float)
    first = [objective.value(objective.residuals(p)[0], weights, DELTAS[0]) for p in np.array_split(grid, 9)]
    found = minimize(objective, grid[np.argsort(np.concatenate(first))[:STARTS]], weights)
    best = int(np.argmin(found.objective))
    if not found.gradient[best] < 1e-3 * DELTAS[-1]:
        constants = ", ".join(f"{value:.3g}" for value in found.theta[best])
        raise InputError(
            "the parametric fit did not converge",
            found=f"a gradient of {found.gradient[best]:.2g} at ln E, ln A, ln B, alpha, beta = {constants}",
            fix="fit more sizes and budgets, or --approach 2",
        )
    return Minimum(*(part[best : best + 1] for part in found))


def bootstrap(objective: Objective, theta: Array, count: int, seed: int) -> Array:
    """(count, 5) constants of resampled runs (with replacement), each from the fit's own theta (1, 5)."""
    n = len(objective.log_loss)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=count).astype(float)
    parts = np.array_split(weights, max(1, count // 100))
    return np.concatenate([minimize(objective, np.repeat(theta, len(part), 0), part).theta for part in parts])
