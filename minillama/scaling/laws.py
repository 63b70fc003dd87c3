"""Parametric scaling laws, their compute-optimal allocation and confidence intervals. No torch, no numpy.

Notation: N parameters, D training tokens, C training FLOPs, U unique training tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from minillama.config.loader import build, config_path, read_toml
from minillama.errors import InputError

NATS, BITS = "nats per token", "bits per byte"  # units of a loss

DEGENERATE = 1.5  # an exponent beyond it is none that was ever measured
CONSTANTS = ("E", "A", "B", "alpha", "beta")
Range = tuple[float, ...]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Law:
    """Parametric scaling law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556, eq. 2).

    The fields are the keys of a file in configs/scaling, and of what `minillama scaling fit --output` writes.
    """

    E: float = field(metadata={"min": 0})
    """Irreducible loss."""
    A: float = field(metadata={"above": 0})
    """Coefficient of the model's term."""
    B: float = field(metadata={"above": 0})
    """Coefficient of the data's term."""
    alpha: float = field(metadata={"above": 0})
    """Exponent of the model's term."""
    beta: float = field(metadata={"above": 0})
    """Exponent of the data's term."""
    repeat_tokens: float = field(default=15.387756, metadata={"above": 0})
    """R*_D, decay of the worth of repeated tokens (Muennighoff et al. 2023, arXiv 2305.16264)."""
    repeat_params: float = field(default=5.309743, metadata={"above": 0})
    """R*_N, decay of the worth of parameters in excess of what the unique tokens need."""
    unit: str = NATS
    """Unit of the loss."""
    samples: tuple[Range, ...] = ()
    """Constants (E, A, B, alpha, beta) of resampled runs, from which intervals are taken; none where unknown."""
    residual: float = field(default=0.0, metadata={"min": 0})
    """Root mean square of ln(predicted loss / loss) over the fitted runs."""
    flops: Range = ()
    """Least and greatest C of the fitted runs."""

    def __post_init__(self) -> None:
        if any(len(row) != len(CONSTANTS) for row in self.samples):
            raise InputError("not five constants", where="samples", expected=f"rows of {', '.join(CONSTANTS)}")
        if len(self.flops) not in (0, 2):
            raise InputError("not a range", where="flops", found=list(self.flops), expected="two values or none")

    @classmethod
    def load(cls, name: str) -> Law:
        """Law of a name in configs/scaling (chinchilla, epoch, muennighoff) or of a TOML file.

        Raises:
            InputError: neither, or a file with other keys.
        """
        values, origin = read_toml(config_path("scaling", name))
        return build(cls, values, origin)

    def loss(self, params: float, tokens: float) -> float:
        """L(N, D)."""
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    def degenerate(self) -> list[str]:
        """Constants that the fitted runs did not determine, each with the reason."""
        steep, flat = "the runs do not determine it", "E takes the place of its term"
        found = [(name, steep) for name in ("alpha", "beta") if getattr(self, name) > DEGENERATE]
        found += [(name, flat) for name in ("A", "B") if getattr(self, name) < 2]
        return [f"{name} = {getattr(self, name):.3g} is degenerate: {reason}" for name, reason in found]

    def exponents(self) -> tuple[float, float]:
        """Exponents (a, b) of N_opt ~ C^a and D_opt ~ C^b: beta / (alpha + beta) and alpha / (alpha + beta)."""
        a = self.beta / (self.alpha + self.beta)
        return a, 1 - a

    @property
    def balance(self) -> float:
        """G = (alpha A / (beta B))^(1 / (alpha + beta)), N_opt / (C / 6)^a."""
        return float((self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta)))

    def optimum(self, flops: float) -> tuple[float, float]:
        """Compute-optimal (N, D) with C = 6ND: N = G (C/6)^a, D = (C/6)^b / G (arXiv 2203.15556, eq. 4)."""
        a, b = self.exponents()
        return self.balance * (flops / 6) ** a, (flops / 6) ** b / self.balance

    def resampled(self) -> Iterator[Law]:
        """Laws of the samples."""
        for e, a, b, alpha, beta in self.samples:
            yield replace(self, E=e, A=a, B=b, alpha=alpha, beta=beta, samples=())

    def params_for(self, tokens: float) -> float:
        """N for which D tokens are compute-optimal."""
        a, b = self.exponents()
        return float(self.balance * (tokens * self.balance) ** (a / b))


def effective(count: float, unique: float, decay: float) -> float:
    """Effective number U + U R* (1 - e^(-R / R*)) of tokens or parameters, R = count / U - 1 (arXiv 2305.16264, eq. 5).

    Args:
        count: tokens that are read, or parameters.
        unique: U, those of them that are unique, or that unique tokens need.
        decay: R*; the limit for many repetitions is U (1 + R*).
    """
    return unique * (1 + decay * (1 - math.exp(-(count / unique - 1) / decay)))


def repeated_loss(law: Law, params: float, tokens: float, unique: float) -> float:
    """Data-constrained scaling law E + A / N'^alpha + B / D'^beta (Muennighoff et al. 2023, arXiv 2305.16264, eq. 5).

    D' is the effective number of the D tokens, of which U are unique; N' that of the N parameters, of which
    min(N, N_opt) are needed for U tokens.

    Args:
        law: for unique data.
        params: N.
        tokens: D, D/U epochs of the unique tokens.
        unique: U.

    Raises:
        InputError: fewer training tokens than unique ones.
    """
    if unique > tokens:
        expected = f"at most the training tokens, {tokens:.6g}"
        raise InputError("more unique tokens than training tokens", found=f"{unique:.6g}", expected=expected)
    needed = min(params, law.params_for(unique))
    return law.loss(effective(params, needed, law.repeat_params), effective(tokens, unique, law.repeat_tokens))


def interval(law: Law, quantity: Callable[[Law], float], residual: float = 0.0) -> Interval | None:
    """Confidence interval of a positive quantity of the law, 95 %; None without samples.

    Args:
        law: with samples of its constants.
        quantity: of a law.
        residual: standard deviation of ln(quantity) around the law, for a prediction of one run.
    """
    if not law.samples:
        return None
    middle, values, tail = quantity(law), sorted(map(quantity, law.resampled())), len(law.samples) // 40
    low, high = (math.log(value / middle) for value in (values[tail], values[-1 - tail]))
    noise = 1.96 * residual
    return middle * math.exp(-math.hypot(min(low, 0), noise)), middle * math.exp(math.hypot(max(high, 0), noise))


def minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Argument of the minimum of a unimodal function of a positive number, by golden-section search in its logarithm.

    The minimum is flat: the argument is right to about 1e-8, the value to machine precision.
    """
    ratio = (math.sqrt(5) - 1) / 2
    a, b = math.log(low), math.log(high)
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    left, right = function(math.exp(c)), function(math.exp(d))
    while b - a > 1e-9:
        if left <= right:
            b, d, right = d, c, left
            c = b - ratio * (b - a)
            left = function(math.exp(c))
        else:
            a, c, left = c, d, right
            d = a + ratio * (b - a)
            right = function(math.exp(d))
    return math.exp((a + b) / 2)
