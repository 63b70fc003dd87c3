"""Sampling error of a mean, paired difference of two models on the same items, interval of a proportion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

Z = 1.959964  # 97.5 % quantile of the normal distribution


class Estimate(NamedTuple):
    """Mean of n values and its standard error, sample standard deviation / sqrt(n); 0 of a single value."""

    mean: float
    error: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval, mean +- 1.96 standard errors."""
        return self.mean - Z * self.error, self.mean + Z * self.error


def estimate(values: Sequence[float]) -> Estimate:
    """Mean with its standard error."""
    n = len(values)
    return Estimate(fmean(values), stdev(values) / math.sqrt(n) if n > 1 else 0.0, n)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Mean difference ours - theirs, item by item, whose error is smaller than that of two unrelated samples."""
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of estimates from different items."""
    k = len(estimates)
    error = math.sqrt(math.fsum(one.error**2 for one in estimates)) / k
    return Estimate(fmean(one.mean for one in estimates), error, sum(one.n for one in estimates))


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion of n, ties counting half. Wilson 1927, JASA 22 (158)."""
    if not n:
        return 0.0, 1.0
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)
