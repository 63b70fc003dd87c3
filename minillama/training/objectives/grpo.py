"""Group-relative policy optimization: GRPO, Dr. GRPO, DAPO's clipping and mean, RLOO, GSPO, CISPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minillama.runs.feedback import FeedbackConfig, GRPOConfig
from minillama.training.objectives.advantages import (
    Policy,
    averaging,
    cispo_loss,
    group_advantages,
    kl_estimate,
    policy_loss,
    sequence_log_ratio,
)
from minillama.training.objectives.base import Batch, Metrics
from minillama.training.objectives.rollouts import Feedback, trimmed


@dataclass(eq=False)
class GRPO(Feedback):
    """Clipped policy gradient whose advantage is the reward beside those of the other answers to the prompt.

    loss = mean_t max(-A r_t, -A clip(r_t)) + beta KL_t, r_t = pi(token_t) / pi_old(token_t) (arXiv 2402.03300, eq. 3).
    """

    settings: GRPOConfig

    def judge(self, scores: Tensor) -> Metrics:
        """Advantages of the answers, the same for each token."""
        settings, rewards = self.settings, scores.view(-1, self.settings.samples)
        groups = group_advantages(rewards, settings.baseline)
        if settings.kl == "k1":  # not divided by the standard deviation, as little as the k2 and k3 of the loss
            kl = (self.buffer["old"] - self.buffer["reference"]).sum(1).view_as(rewards)
            baseline = "mean" if settings.baseline == "std" else settings.baseline
            groups = groups + group_advantages(torch.where(rewards.isnan(), rewards, -settings.beta * kl), baseline)
        self.buffer["advantages"] = groups.view(-1, 1) * self.buffer["mask"]
        return {}

    def weighted(self, batch: Batch) -> Batch:
        mask = batch.extras["mask"]
        weights, total = averaging(mask, self.settings.average, self.settings.max_new_tokens)
        return replace(batch, weights=weights, totals=policy_totals(mask, total))

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        batch = trimmed(batch, self.model)
        found, entropies = self.log_probabilities(self.model, batch)
        return policy_terms(self.settings, batch, found, entropies, self.settings.policy)


def policy_totals(mask: Tensor, total: float) -> dict[str, float]:
    """Divisors of what `policy_terms` gives: `total` of the loss, answers of the KL, tokens of the rest."""
    tokens = dict.fromkeys(("entropy", "clipped", "approx_kl"), mask.sum().item())
    return {"policy": total, "kl_penalty": total, "kl": float(mask.any(1).sum()), **tokens}


def policy_terms(
    settings: FeedbackConfig, batch: Batch, log_probs: Tensor, entropies: Tensor, kind: Policy = "ppo"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Policy loss and KL penalty, weighted sums; entropy in nats and clipped tokens, plain sums.

    Args:
        settings: clipping and KL.
        batch: with `mask`, `advantages`, and, where known, `old` and `reference` log-probabilities (B, T).
        log_probs: (B, T) under the policy.
        entropies: (B, T).
        kind: of the policy loss.
    """
    parts, weights = batch.extras, batch.weights
    mask, old = parts["mask"], parts.get("old", log_probs.detach())
    log_ratio, advantages, high = log_probs - old, parts["advantages"], settings.clip_high
    if kind == "cispo":
        losses, clipped = cispo_loss(log_probs, log_ratio, advantages, high)
    else:
        log_ratio = sequence_log_ratio(log_ratio, mask) if kind == "gspo" else log_ratio
        losses, clipped = policy_loss(log_ratio, advantages, settings.clip_low, high, settings.dual_clip)
    terms = {"policy": (losses * weights).sum()}
    metrics = {"entropy": entropies.sum(), "clipped": (clipped & mask).sum()}
    if settings.kl in ("k2", "k3"):
        penalty = kl_estimate(log_probs, parts["reference"], settings.kl)
        terms["kl_penalty"] = settings.beta * (penalty * weights).sum()
        if "old" not in parts:
            metrics["kl"] = (log_probs.detach() - parts["reference"]).sum()
    if "old" in parts:
        with torch.no_grad():
            metrics["approx_kl"] = kl_estimate(parts["old"], log_probs, "k3")[mask].sum()
    return terms, metrics
