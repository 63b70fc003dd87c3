"""A bandit with a closed-form optimum for every objective and KL estimator; `feedback.py bandit` runs it."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.data.prompts import Prompt, Prompts
from minillama.evaluate.rewards import Scored
from minillama.evaluate.rules import Answer
from minillama.model import Decoder
from minillama.runs.feedback import FeedbackConfig, GRPOConfig, PPOConfig
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.train import byte_tokenizer
from minillama.training.gradients import accumulate, clip
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


# name -> settings, the optimum, and how near it the policy comes
BANDITS: dict[str, tuple[FeedbackConfig, Sequence[float], float]] = {
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


def bandit(settings: FeedbackConfig, seed: int, steps: int, rows: int, rate: float = 1e-3) -> Tensor:
    """Probabilities of the answers after training by an objective."""
    question = Prompt(QUESTION, "?", {}, Conversation(()), "bandit")
    data, model = Prompts([question], [question], 256, ""), bandit_start(seed)
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


def compare(args: argparse.Namespace) -> None:
    for name, (settings, wanted, bound) in BANDITS.items():
        if args.only not in name:
            continue
        began, found = time.process_time(), []
        for seed in range(args.seeds):
            found.append(bandit(settings, seed, args.steps * settings.epochs, args.rows, args.rate))
        off = max(
            max(abs(p - w) for p, w in zip(each.tolist(), wanted or each.tolist(), strict=True)) for each in found
        )
        shown = " | ".join(" ".join(f"{p:.3f}" for p in each.tolist()) for each in found)
        text = " ".join(f"{p:.3f}" for p in wanted)
        verdict = "ok" if off <= bound else "OFF"
        seconds = (time.process_time() - began) / args.seeds
        print(f"{name:30} {shown}; optimum {text}; off by {off:.4f}, {verdict}; {seconds:.0f} s a run", flush=True)
