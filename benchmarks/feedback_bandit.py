"""A bandit with a closed-form optimum for every objective and KL estimator; `feedback.py bandit` runs it."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.data.permutation import derive_keys
from minillama.data.preference_set import Judged, Preferences
from minillama.data.prompts import Prompt, Prompts
from minillama.evaluate.rewards import Scored
from minillama.evaluate.rules import Answer
from minillama.inference.rollout import answers
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.runs.feedback import FeedbackConfig, GRPOConfig, PPOConfig
from minillama.runs.objectives import DPOConfig
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.train import byte_tokenizer
from minillama.training.gradients import accumulate, clip
from minillama.training.objectives.base import Objective
from minillama.training.objectives.dpo import DPO
from minillama.training.objectives.grpo import GRPO
from minillama.training.objectives.ppo import PPO

# one question, four answers of one token
REFERENCE, EARNED, BETA = (0.4, 0.3, 0.2, 0.1), (0.0, 0.5, 1.0, 1.5), 0.5
QUESTION = [40, 41]


class Arms:
    """Reward of an arm; -1 for what is none."""

    models, tokenizer = {}, byte_tokenizer()

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        found = torch.tensor([(*EARNED, -1.0)[min(answer.ids[0], 4)] for answer in answers])
        return Scored(found, {"arm": found})


def reverse_kl() -> list[float]:
    """P = q e^(r / beta) / Z, which maximizes the reward minus beta KL(p || q)."""
    weights = [q * math.exp(r / BETA) for q, r in zip(REFERENCE, EARNED, strict=True)]
    return [weight / sum(weights) for weight in weights]


def forward_kl(scale: float = 1.0) -> list[float]:
    """P = beta q / (beta - s (r - mean r)), where the gradient of s times the reward is that of beta KL(q || p)."""
    low, high = -10.0, 10.0
    for _ in range(200):  # the mean reward by bisection
        mean = (low + high) / 2
        found = [BETA * q / max(1e-9, BETA - scale * (r - mean)) for q, r in zip(REFERENCE, EARNED, strict=True)]
        low, high = (mean, high) if sum(found) > 1 else (low, mean)
    return found


def tempered() -> list[float]:
    """As `reverse_kl` where the group's own mean weakens the reward by 7/8."""
    weights = [q * math.exp(0.875 * r / BETA) for q, r in zip(REFERENCE, EARNED, strict=True)]
    return [weight / sum(weights) for weight in weights]


def group(**given: object) -> GRPOConfig:
    return GRPOConfig(rewards=(), max_new_tokens=1, beta=BETA, **given)  # type: ignore[arg-type]


def best(count: int) -> list[float]:
    """Distribution of the best of K answers of the reference: F_i^K - F_i-1^K, F the sums by rising reward."""
    sums = [sum(REFERENCE[:i]) for i in range(len(REFERENCE) + 1)]
    return [above**count - below**count for below, above in itertools.pairwise(sums)]


# name -> settings, or K of the best of K, the optimum, and how near it the policy comes
BANDITS: dict[str, tuple[FeedbackConfig | DPOConfig | int, Sequence[float], float]] = {
    "RLOO, k1 in the reward": (group(baseline="leave-one-out", kl="k1"), reverse_kl(), 0.01),
    "group mean, k1 in the reward": (group(baseline="mean", kl="k1"), reverse_kl(), 0.01),
    "PPO, k1 in the reward": (
        PPOConfig(rewards=(), max_new_tokens=1, samples=8, minibatches=2, epochs=2, beta=BETA, value_clip=1.0),
        reverse_kl(),
        0.01,
    ),
    "RLOO, k2 in the loss": (group(baseline="leave-one-out", kl="k2"), reverse_kl(), 0.01),
    "RLOO, k3 in the loss": (group(baseline="leave-one-out", kl="k3"), forward_kl(), 0.01),
    "group mean, k2 in the loss": (group(baseline="mean", kl="k2"), tempered(), 0.01),
    "group mean, k3 in the loss": (group(baseline="mean", kl="k3"), forward_kl(0.875), 0.01),
    "GRPO (std), k3 in the loss": (group(baseline="std", kl="k3"), (0.087, 0.078, 0.076, 0.759), 0.02),
    "RLOO, no KL": (group(baseline="leave-one-out"), (0.0, 0.0, 0.0, 1.0), 0.02),
    "DPO": (DPOConfig(beta=BETA), reverse_kl(), 0.01),
    "best of 4": (4, best(4), 0.05),  # 1,000 draws
    "best of 16": (16, best(16), 0.05),
}


def bandit_start(seed: int) -> Decoder:
    """A model that answers as the reference does."""
    shape = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=192, vocab_size=257, max_seq_len=16)
    model = Decoder(shape)
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        loss = -(torch.tensor(REFERENCE) * model(torch.tensor([QUESTION]))[0, -1].log_softmax(-1)[:4]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def arms(model: Decoder) -> Tensor:
    """Exact probabilities of the four answers."""
    return model(torch.tensor([QUESTION]))[0, -1].softmax(-1)[:4]


def pairs(count: int = 500) -> Preferences:
    """Pairs of any two arms, as often each way as Bradley and Terry's model of their rewards has it."""
    made = []
    for one, two in itertools.combinations(range(len(EARNED)), 2):
        wins = round(count / (1 + math.exp(EARNED[two] - EARNED[one])))
        made += [Judged.of(QUESTION, [[one], [two]] if i < wins else [[two], [one]], 0.0) for i in range(count)]
    return Preferences.of(made, made[:1], 4)


def drawn(model: Decoder, count: int, seed: int, draws: int = 1000) -> Tensor:
    """Shares of the answers among the best of K samples."""
    seeds = [derive_keys("best", seed, i)[0] >> 8 for i in range(draws)]
    found = answers(model, [QUESTION] * draws, count, 1, Sampling(1.0), (), seeds)
    ids = torch.tensor([request.tokens[0] for request in found]).view(draws, count)
    chosen = torch.where(ids < len(EARNED), ids, -1).amax(1)  # their rewards rise with their ids
    return torch.stack([(chosen == arm).double().mean() for arm in range(len(EARNED))])


def bandit(settings: FeedbackConfig | DPOConfig | int, seed: int, steps: int, rows: int, rate: float = 1e-3) -> Tensor:
    """Probabilities of the answers after training by an objective, or as the best of K."""
    question = Prompt(QUESTION, "?", {}, Conversation(()), "bandit")
    data, model = Prompts([question], [question], 256, ""), bandit_start(seed)
    if isinstance(settings, int):
        return drawn(model, settings, seed)
    objective: Objective
    if isinstance(settings, DPOConfig):
        objective = DPO(model, pairs(), seed, rows, rows, settings)
    else:
        kind = PPO if isinstance(settings, PPOConfig) else GRPO
        objective = kind(model, data, seed, rows, settings, Arms(), rows)  # type: ignore[arg-type]
    parameters = [parameter for part in objective.models.values() for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        objective.prepare(step)
        accumulate(objective, objective.batch(step), rows, model.device)
        clip(objective.models, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return arms(model)


def distance(found: Tensor, wanted: Sequence[float]) -> float:
    """Largest distance of the answers' shares from the optimum; what is outside the answers, DPO does not bound."""
    return (found / found.sum() - torch.tensor(wanted)).abs().max().item()


def compare(args: argparse.Namespace) -> None:
    for name, (settings, wanted, bound) in BANDITS.items():
        if args.only not in name:
            continue
        began, found = time.process_time(), []
        for seed in range(args.seeds):
            steps = args.steps * getattr(settings, "epochs", 1)
            found.append(bandit(settings, seed, steps, args.rows, args.rate))
        off = max(distance(each, wanted) for each in found)
        outside = max(1 - each.sum().item() for each in found)
        shown = " | ".join(" ".join(f"{p:.3f}" for p in each.tolist()) for each in found)
        text = " ".join(f"{p:.3f}" for p in wanted)
        verdict = "ok" if off <= bound else "OFF"
        seconds = (time.process_time() - began) / args.seeds
        print(
            f"{name:30} {shown}; optimum {text}; off by {off:.4f}, {verdict}; outside {outside:.4f}; {seconds:.0f} s",
            flush=True,
        )
