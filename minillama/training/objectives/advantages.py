"""Policy-gradient arithmetic: advantages, KL estimators, clipped losses; pure functions of log-probabilities.

Shapes: B answers, T time, G groups, K answers per group. `mask` (B, T) is true on the tokens of the answers; what lies
outside, NaN included, changes nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["std", "mean", "leave-one-out"]
Average = Literal["tokens", "answers", "length"]
KL = Literal["none", "k1", "k2", "k3"]
Policy = Literal["ppo", "gspo", "cispo"]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: A_t = delta_t + gamma lam A_t+1, delta_t = r_t + gamma V_t+1 - V_t.

    Schulman et al. 2016, arXiv 1506.02438. t + 1 is the next token of the mask; behind the last, A and V are 0.

    Returns:
        (B, T) advantages A and returns A + V, 0 outside the mask.
    """
    rewards, values = _zeroed(rewards, mask), _zeroed(values, mask)
    advantages = torch.zeros_like(values)
    after, running = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        here, value = mask[:, t], values[:, t]
        advantage = rewards[:, t] + gamma * after - value + gamma * lam * running
        after, running = torch.where(here, value, after), torch.where(here, advantage, running)
        advantages[:, t] = torch.where(here, advantage, 0.0)
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """Whitened values (x - mean) / sqrt(var + 1e-8), moments over the mask, variance unbiased; 0 outside it.

    Args:
        values: of any shape.
        mask: of the same; everything unless given.
        shift_mean: leave the mean out; otherwise it is added back.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    chosen = values[mask]
    mean = chosen.mean()
    scale = torch.rsqrt(chosen.var() + 1e-8) if len(chosen) > 1 else torch.ones_like(mean)
    white = (values - mean) * scale
    return _zeroed(white if shift_mean else white + mean, mask)


def group_advantages(rewards: Tensor, baseline: Baseline, eps: float = 1e-4) -> Tensor:
    """Advantages over the other answers to a prompt: rewards (G, K) -> (G, K), 0 for NaN, which no baseline counts.

    std: (r - mean) / (std + eps), unbiased (GRPO, arXiv 2402.03300); mean: r - mean (Dr. GRPO, 2503.20783);
    leave-one-out: r - mean of the others (RLOO, 2402.14740). Equal rewards give exactly 0.
    """
    known = ~rewards.isnan()
    found = _zeroed(rewards, known).double()  # in which float32 rewards that are equal have that mean
    count = known.sum(1, keepdim=True)
    centered = _zeroed(found - found.sum(1, keepdim=True) / count, known)
    others = (count - 1).clamp(min=1)
    if baseline == "std":
        centered = centered / ((centered.square().sum(1, keepdim=True) / others).sqrt() + eps)
    elif baseline == "leave-one-out":
        centered = centered * count / others
    least, most = (fill.amax(1, keepdim=True) for fill in (_filled(-found, known), _filled(found, known)))
    return torch.where(-least == most, 0.0, centered).to(rewards.dtype)


def kl_estimate(log_probs: Tensor, reference: Tensor, kind: KL) -> Tensor:
    """Estimates of KL(pi || ref) per token from d = log pi - log ref (Schulman 2020, "Approximating KL divergence").

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. Under pi the gradient of k2 is that of KL(pi || ref), that of k3 the one
    of KL(ref || pi), and that of k1 is 0 on average: it belongs in the reward.
    """
    d = log_probs - reference
    if kind == "k2":
        return d.square() / 2
    return torch.exp(-d) - 1 + d if kind == "k3" else d


def adapted_beta(beta: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """Adaptive KL coefficient: beta (1 + e n / horizon), e = KL / target - 1 within +-0.2 (arXiv 1909.08593, §2.2)."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


def token_rewards(kl: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Rewards per token (B, T): -beta KL_t, and the score (B,) at the last token of the answer."""
    rewards = _zeroed(-beta * kl, mask)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return rewards.scatter_add(1, last[:, None], torch.where(mask.any(1), scores, 0.0)[:, None])


def policy_loss(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Clipped policy loss max(-A r, -A clip(r, 1 - low, 1 + high)) per token, r = e^log_ratio, and where it clips.

    Schulman et al. 2017, arXiv 1707.06347, eq. 7; low < high is DAPO's (2503.14476).

    Args:
        dual: c > 1, at most -A c where A < 0: dual-clip PPO (arXiv 1912.09729, eq. 5); 0: no such bound.
    """
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    losses, flags = torch.maximum(plain, clipped), clipped > plain
    if not dual:
        return losses, flags
    bound = torch.where(advantages < 0, -advantages * dual, torch.inf)
    return torch.minimum(losses, bound), flags | (losses > bound)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Mean log-ratio of each answer, at each of its tokens (B, T): that of GSPO (arXiv 2507.18071, eq. 7)."""
    mean = _zeroed(log_ratio, mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(log_ratio)


def cispo_loss(log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, high: float) -> tuple[Tensor, Tensor]:
    """CISPO per token, -min(r, 1 + high) A log pi, without a gradient through the ratio; and where it clips.

    MiniMax-M1, arXiv 2506.13585, eq. 4: tokens whose ratio is clipped keep their gradient.
    """
    ratio = log_ratio.detach().exp()
    return -ratio.clamp(max=1 + high) * advantages * log_probs, ratio > 1 + high


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Clipped value loss 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) per token."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def averaging(mask: Tensor, average: Average, longest: int) -> tuple[Tensor, float]:
    """Weights (B, T) of the tokens and the divisor of their sum, over the whole batch.

    tokens: mean over all tokens (DAPO); answers: mean of the answers' means (GRPO); length: the sum over B `longest`,
    the tokens that an answer may have (Dr. GRPO).
    """
    weights, rows = mask.float(), float(mask.any(1).sum())
    if average == "answers":
        return weights / weights.sum(1, keepdim=True).clamp(min=1), rows
    return weights, weights.sum().item() if average == "tokens" else rows * longest


def _zeroed(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _filled(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, -torch.inf)
