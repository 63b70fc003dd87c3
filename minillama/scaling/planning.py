"""Compute-optimal plan of a training run: N, D, shape, learning rate, batch, predicted loss. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.scaling.laws import NATS, Interval, Law, interval, minimum, repeated_loss
from minillama.scaling.shapes import batch_tokens, learning_rate, nearest, size

FAR = 10  # times the greatest C of the fitted runs
RATIO = 100  # D/N beyond which fits overestimate what more tokens bring (arXiv 2401.00448)
EPOCHS = 4  # beyond which repeated tokens are worth visibly less (arXiv 2305.16264)
SMALLEST, GREATEST = 1e3, 1e16  # N that is searched

Allocation = tuple[float, float]
"""N and D."""


def predicted_loss(law: Law, params: float, tokens: float, unique: float = 0) -> float:
    """L(N, D), of which at most U tokens are unique; 0: all of them."""
    return repeated_loss(law, params, tokens, min(unique, tokens)) if unique else law.loss(params, tokens)


def optimum(law: Law, flops: float, unique: float = 0) -> Allocation:
    """Compute-optimal allocation of C = 6ND; with U unique tokens the best split into parameters and epochs."""
    params, tokens = law.optimum(flops)
    if unique and tokens > unique:
        params = minimum(
            lambda n: predicted_loss(law, n, flops / 6 / n, unique), flops / 6 / GREATEST, flops / 6 / unique
        )
    return params, flops / 6 / params


def cheapest(law: Law, loss: float, inference: float, unique: float = 0) -> Allocation:
    """Least total FLOPs 6ND + 2N I for a loss (Sardana et al. 2023, arXiv 2401.00448, eq. 1).

    Args:
        loss: to reach.
        inference: I, tokens of inference over the model's life.
        unique: unique training tokens; 0: all.

    Raises:
        InputError: a loss that no model reaches.
    """
    if loss <= law.E:
        raise InputError("that loss is below the irreducible one", found=loss, expected=f"more than {law.E:.6g}")

    def total(params: float) -> float:
        return params * (6 * tokens_for_loss(law, params, loss, unique) + 2 * inference)

    params = minimum(total, SMALLEST, GREATEST)
    return params, tokens_for_loss(law, params, loss, unique)


def tokens_for_loss(law: Law, params: float, loss: float, unique: float = 0) -> float:
    """Tokens D at which N parameters reach a loss; infinite if no D does."""
    return _solve(lambda tokens: predicted_loss(law, params, tokens, unique) <= loss, 1.0, 1e30)


def _solve(reached: Callable[[float], bool], low: float, high: float) -> float:
    """Least positive number at which a condition holds, by bisection of its logarithm; infinite where none is."""
    if not reached(high):
        return math.inf
    a, b = math.log(low), math.log(high)
    while b - a > 1e-12 * max(1.0, abs(b)):
        a, b = (a, (a + b) / 2) if reached(math.exp((a + b) / 2)) else ((a + b) / 2, b)
    return math.exp(b)


@dataclass(frozen=True)
class Plan:
    """Run to be trained.

    Args:
        optimum: N and D by the law; with inference those of the least total FLOPs.
        optimum_loss: L at them.
        optimum_interval: 95 % of N_opt; None where the law has no samples, with repeated data and with inference.
        shape: the nearest shape that can be built.
        params: N of the shape.
        tokens: D for it.
        flops: C, counted exactly.
        loss: predicted for the shape.
        loss_interval: 95 %, of one run; None where the law has no samples.
        learning_rate: peak.
        rows: sequences per step.
        steps: optimizer steps.
        saved: share of the total FLOPs that the allocation for training alone would take in addition; 0 without
            inference.
        notes: reasons for doubt.
    """

    optimum: Allocation
    optimum_loss: float
    optimum_interval: Interval | None
    shape: ModelConfig
    params: int
    tokens: float
    flops: float
    loss: float
    loss_interval: Interval | None
    learning_rate: float
    rows: int
    steps: int
    saved: float
    notes: tuple[str, ...]


def plan(
    law: Law,
    base: ModelConfig,
    *,
    flops: float = 0,
    params: float = 0,
    tokens: float = 0,
    unique: float = 0,
    inference: float = 0,
) -> Plan:
    """Plan from one of C, N, D.

    Args:
        base: vocabulary and context of the model.
        flops: C; the shape's D then spends it exactly.
        params: N.
        tokens: D.
        unique: U, unique tokens; 0: as many as are needed.
        inference: I, tokens of inference; the cheapest model of the same loss. 0: training alone counts.

    Raises:
        InputError: an optimum beyond N of 1e3 to 1e16 or D of 1e16.
    """
    alone = optimum(law, flops or _flops_for(law, params, tokens, unique), unique)
    best = cheapest(law, predicted_loss(law, *alone, unique), inference, unique) if inference else alone
    if not (SMALLEST <= best[0] <= GREATEST and best[1] < 0.99 * GREATEST):
        expected = f"N of {SMALLEST:g} to {GREATEST:g}, D of less than {GREATEST:g}"
        found = f"N {best[0]:.4g}, D {best[1]:.4g}"
        raise InputError("the optimum is beyond what is searched", found=found, expected=expected)
    totals = [n * (6 * d + 2 * inference) for n, d in (best, alone)]
    shape = nearest(best[0], base)
    built, per_token = size(shape), shape.flops_per_token(shape.max_seq_len)
    spent = flops / per_token if flops and not inference else best[1]
    loss, guess = predicted_loss(law, built, spent, unique), math.log(shape.vocab_size)
    notes = _doubts(law, best, built, spent, spent * per_token, unique)
    if law.unit == NATS and loss > guess:
        notes.append(f"no prediction: a guess among {shape.vocab_size:,} tokens has {guess:.4g} nats")
    exact, is_plain = spent * per_token, not (unique or inference)
    rows = max(1, round(batch_tokens(exact) / shape.max_seq_len))
    return Plan(
        optimum=best,
        optimum_loss=predicted_loss(law, *best, unique),
        optimum_interval=interval(law, lambda near: near.optimum(6 * best[0] * best[1])[0]) if is_plain else None,
        shape=shape,
        params=built,
        tokens=spent,
        flops=exact,
        loss=loss,
        loss_interval=interval(law, lambda near: predicted_loss(near, built, spent, unique), law.residual),
        learning_rate=learning_rate(exact),
        rows=rows,
        steps=max(1, round(spent / (rows * shape.max_seq_len))),
        saved=max(0.0, 1 - totals[0] / totals[1]),
        notes=tuple(notes),
    )


def _flops_for(law: Law, params: float, tokens: float, unique: float) -> float:
    """C for which N, or else D, is compute-optimal."""

    def reached(flops: float) -> bool:
        best = optimum(law, flops, unique)
        return best[0] >= params if params else best[1] >= tokens

    flops = _solve(reached, 6.0, 6 * GREATEST**2)
    if flops == math.inf:
        name, found = ("params", params) if params else ("tokens", tokens)
        raise InputError("beyond what is searched", where=name, found=found, expected=f"at most {GREATEST:g} or so")
    return flops


def _doubts(law: Law, best: Allocation, params: float, tokens: float, flops: float, unique: float) -> list[str]:
    found = law.degenerate()
    if abs(math.log(params / best[0])) > 0.25:
        found.append(f"no shape of this vocabulary is nearer to N = {best[0]:.4g} than {params:.4g}")
    if law.flops and flops > FAR * law.flops[1]:
        found.append(f"{flops / law.flops[1]:.3g} times the FLOPs of the largest run that the law was fitted to")
    if law.flops and flops < law.flops[0] / FAR:
        found.append(f"{flops / law.flops[0]:.3g} of the FLOPs of the smallest run that the law was fitted to")
    if tokens / params > RATIO:
        found.append(f"D/N = {tokens / params:.3g}: fits overestimate what training beyond {RATIO} brings")
    if unique and tokens > EPOCHS * unique:
        found.append(f"{tokens / unique:.3g} epochs: repeated tokens are worth less beyond {EPOCHS}")
    return found
