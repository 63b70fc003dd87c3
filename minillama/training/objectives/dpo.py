"""Direct preference optimization and its relatives, as functions of log-probabilities."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.inference.engine import evaluating
from minillama.runs.objectives import DPOConfig
from minillama.training.objectives.base import Batch, Metrics
from minillama.training.objectives.compared import REFERENCE, Compared
from minillama.training.objectives.reward import longer_wins, wins
from minillama.training.ranks import Ranks

FALL = 0.1  # nats by which chosen answers may become less likely before there is a warning


def _sigmoid(chosen: Tensor, rejected: Tensor, beta: float, eps: Tensor | float = 0.0) -> Tensor:
    h = beta * (chosen - rejected)
    return -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)


def _exo(chosen: Tensor, rejected: Tensor, beta: float, eps: float) -> Tensor:
    h = beta * (chosen - rejected)
    first = h.sigmoid() * (F.logsigmoid(h) - math.log(1 - eps))
    return first + (-h).sigmoid() * (F.logsigmoid(-h) - math.log(eps))


def _orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-m_w - beta log sigmoid(log odds(m_w) - log odds(m_l)), odds = p / (1 - p), of mean log-probabilities m."""
    odds = [mean - torch.log(-torch.expm1(mean.clamp(max=-1e-6))) for mean in (chosen, rejected)]
    return -chosen - beta * F.logsigmoid(odds[0] - odds[1])


# name -> loss of the log-ratios c and r of the chosen and the rejected answer, beta and the label smoothing; without a
# reference of their mean log-probabilities per token, beta and the margin
LOSSES: Mapping[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": _sigmoid,  # Rafailov et al. 2023, arXiv 2305.18290, eq. 7; smoothed: conservative DPO
    "robust": lambda c, r, b, e: (  # Chowdhury et al. 2024, arXiv 2403.00409
        ((1 - e) * _sigmoid(c, r, b) - e * _sigmoid(r, c, b)) / (1 - 2 * e)
    ),
    "hinge": lambda c, r, b, e: F.relu(1 - b * (c - r)),  # SLiC, arXiv 2305.10425
    "ipo": lambda c, r, b, e: (c - r - 1 / (2 * b)).square(),  # Azar et al. 2023, arXiv 2310.12036, eq. 17
    "exo": _exo,  # Ji et al. 2024, arXiv 2402.00856
    "nca": lambda c, r, b, e: (  # Chen et al. 2024, arXiv 2402.05369
        -F.logsigmoid(b * c) - 0.5 * F.logsigmoid(-b * c) - 0.5 * F.logsigmoid(-b * r)
    ),
    "bco": lambda c, r, b, e: -F.logsigmoid(b * c) - F.logsigmoid(-b * r),  # arXiv 2404.04656, without its shift
    "sppo": lambda c, r, b, e: (c - 0.5 / b).square() + (r + 0.5 / b).square(),  # Wu et al. 2024, arXiv 2405.00675
    "apo-zero": lambda c, r, b, e: 1 - (b * c).sigmoid() + (b * r).sigmoid(),  # arXiv 2408.06266
    "apo-down": lambda c, r, b, e: (b * c).sigmoid() + 1 - (b * (c - r)).sigmoid(),
    "forward-kl": lambda c, r, b, e: _sigmoid(-(-c).exp(), -(-r).exp(), b, e),  # Wang et al. 2023, arXiv 2309.16240
    "js": lambda c, r, b, e: _sigmoid(F.logsigmoid(c), F.logsigmoid(r), b, e),
    "simpo": lambda c, r, b, gamma: -F.logsigmoid(b * (c - r) - gamma),  # Meng et al. 2024, arXiv 2405.14734, eq. 6
    "orpo": lambda c, r, b, e: _orpo(c, r, b),  # Hong et al. 2024, arXiv 2403.07691, eq. 6, b their lambda
}


def dpo_loss(
    ratios: Tensor,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    probability: Tensor | None = None,
) -> Tensor:
    """DPO loss of each pair; sigmoid: -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h), h = h_w - h_l.

    There p is 1 less the label smoothing, or that of each pair in its place (conservative DPO).

    Args:
        ratios: (..., 2) log-ratios h_w and h_l, of policy to reference, of the chosen and the rejected answer: sums
            over tokens, as papers have them, or means; of simpo and orpo means of log-probabilities alone.
        loss: of `LOSSES`.
        beta: strength of the pull towards the reference.
        label_smoothing: share of exchanged pairs; of simpo the margin gamma.
        probability: (...) that the chosen answer is the better one, which sigmoid alone takes; 1 unless given.
    """
    chosen, rejected = ratios.unbind(-1)
    if probability is not None and loss == "sigmoid":
        exchanged = 1 - probability
        return _sigmoid(chosen, rejected, beta, exchanged + label_smoothing * (1 - 2 * exchanged))
    return LOSSES[loss](chosen, rejected, beta, label_smoothing)


@dataclass(eq=False)
class DPO(Compared):
    """Direct preference optimization, perhaps with the language model's loss of the chosen answers."""

    settings: DPOConfig = field(default_factory=DPOConfig)

    @property
    def compares(self) -> bool:
        return self.settings.has_reference

    def _totals(self, step: int) -> Mapping[str, float]:
        if not self.settings.sft:
            return super()._totals(step)
        rows = self.data.chosen(self.seed, step, self.batch_size)
        tokens = sum(len(self.data.train[row].answers[0]) for row in rows)
        return {"preference": float(self.batch_size), "sft": float(tokens)}

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Sums over the pairs and over the chosen answers' tokens; implicit rewards, log-probabilities in nats."""
        settings = self.settings
        policy, reference = self.log_probabilities(self.model, batch).sum(-1), batch.extras[REFERENCE]
        difference = policy - reference
        ratios = difference / batch.extras["counts"] if settings.per_token or not self.compares else difference
        how = settings.loss, settings.beta, settings.gamma if settings.loss == "simpo" else settings.label_smoothing
        loss = dpo_loss(ratios, *how, batch.extras.get("probability")).sum()
        with torch.no_grad():
            rewards = settings.beta * (difference if self.compares else ratios)
            margin = rewards[:, 0] - rewards[:, 1]
            measured = {"accuracy": wins(margin), "reward_margin": margin}
            measured |= {"chosen_log_ratio": difference[:, 0]} if self.compares else {}
            for side, name in enumerate(("chosen", "rejected")):
                measured |= {f"{name}_reward": rewards[:, side], f"{name}_logp": policy[:, side]}
        metrics = {name: value.sum() for name, value in measured.items()}
        if not settings.sft:
            return {"loss": loss}, metrics
        return {"preference": loss, "sft": -settings.sft * policy[:, 0].sum()}, metrics

    def validate(self, rows: int, limit: int) -> Metrics:
        """Loss, implicit accuracy and the rest on held-out pairs; the longer answer's accuracy; `val_kl`.

        `val_kl` estimates the KL divergence per token on the held-out answers: half the mean square of the log-ratio.
        """
        sums = defaultdict[str, float](float)
        with evaluating(self.model):
            seen, passes = self.held_out(rows, limit)
            for batch, reference, counts in passes:
                policy = self.log_probabilities(self.model, batch)
                batch.extras[REFERENCE] = reference.sum(-1)
                terms, metrics = self.loss(batch)
                moved = {"square": (policy - reference).square().sum() / 2}
                for name, value in {**terms, **metrics, **moved}.items():
                    sums[name] += counts * value.item()
        found, pairs = Ranks.current().sum(sums), len(seen)
        square = found.pop("square")
        chosen = sum(len(row.answers[0]) for row in seen)
        tokens = sum(len(answer) for row in seen for answer in row.answers)
        if "sft" in found:
            found["loss"] = found.pop("preference") + found["sft"] * pairs / chosen
            found["sft"] *= pairs / chosen
        measures = {f"val_{name}": value / pairs for name, value in found.items()}
        measures |= {"val_kl": square / tokens} if self.compares else {}
        return measures | {"val_longer_wins": longer_wins(seen)}

    def warnings(self, measures: Metrics) -> list[str]:
        """That the chosen answers became less likely, which implicit accuracy does not show."""
        fall = -measures.get("val_chosen_log_ratio", 0.0)
        if fall <= FALL:
            return []
        advice = "add --objective.sft 1" if not self.settings.sft else "lower optim.lr, or raise objective.sft"
        return [f"the chosen answers are {fall:.1f} nats less likely than at the start: {advice}"]
