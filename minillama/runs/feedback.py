"""Settings of the objectives that learn from rewards of their own answers: `[objective] name = "grpo"` or "ppo"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.evaluate.rules import Reward
from minillama.runs.kind import Kind


@dataclass(frozen=True)
class FeedbackConfig(Kind):
    """Rollouts, rewards and the clipped policy loss.

    `train.batch_size` answers make an optimizer step, so many times `minibatches` a rollout.
    """

    reads: ClassVar[str] = "prompts"
    has_rollouts: ClassVar[bool] = True
    rewards: tuple[Reward, ...] = (Reward(),)
    """What answers earn, a sum of rules, functions and reward models; NAME or WEIGHT*NAME on the command line."""
    samples: int = field(default=8, metadata={"min": 1})
    """Answers per prompt."""
    oversample: int = field(default=1, metadata={"min": 1})
    """Prompts answered per prompt that is trained on: groups whose rewards differ are taken first, as in DAPO's
    dynamic sampling."""
    max_new_tokens: int = field(default=64, metadata={"min": 1})
    """Tokens per answer at most."""
    temperature: float = field(default=1.0, metadata={"above": 0})
    """Of sampling, and of the trained distribution."""
    cut_off: float = 0.0
    """Subtracted from the reward of an answer that max_new_tokens cut off."""
    minibatches: int = field(default=1, metadata={"min": 1})
    """Optimizer steps per epoch over a rollout."""
    epochs: int = field(default=1, metadata={"min": 1})
    """Epochs over a rollout."""
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    """KL to the start model. k1: subtracted from the reward; k2 (reverse KL) and k3 (forward KL): in the loss."""
    beta: float = field(default=0.04, metadata={"min": 0})
    """Coefficient of the KL."""
    clip_low: float = field(default=0.2, metadata={"above": 0, "max": 1})
    """The probability ratio is clipped below 1 - clip_low."""
    clip_high: float = field(default=0.2, metadata={"above": 0})
    """And above 1 + clip_high; DAPO has 0.28."""
    dual_clip: float = field(default=0.0, metadata={"min": 0})
    """Over 1, 3 is usual: of a negative advantage the ratio counts at most so much (dual-clip PPO); 0: no bound."""
    alarm_kl: float = field(default=20.0, metadata={"min": 0})
    """Warn of a KL over so many nats per answer; 0: never."""

    def commands(self, model: str, prompt: str) -> dict[str, list[str]]:
        """What to do with the trained model."""
        return {"chat": ["minillama", "chat", model]}

    @property
    def has_reference(self) -> bool:  # type: ignore[override]
        """Whether the start model is needed all along."""
        return self.kl != "none"

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.epochs * self.minibatches

    def check(self, batch_size: int, context: int, dropout: float) -> None:
        """Check against the training loop's settings.

        Raises:
            InputError: prompts that are no whole number, or chosen by a single answer, an answer longer than the
                context, or dropout, under which log-probabilities do not repeat.
        """
        rows = batch_size * self.minibatches
        if rows % self.samples:
            found, expected = f"{batch_size} x {self.minibatches}", f"a multiple of objective.samples = {self.samples}"
            what = "batch_size times minibatches is no whole number of prompts"
            raise InputError(what, where="train.batch_size", found=found, expected=expected)
        if self.oversample > 1 and self.samples < 2:
            what, where = "oversampling compares the answers to a prompt, and there is one", "objective.samples"
            raise InputError(what, where=where, found=self.samples, expected="2 or more with objective.oversample")
        if self.max_new_tokens >= context:
            what, expected = "an answer would leave no room for its prompt", f"fewer than train.context = {context}"
            raise InputError(what, where="objective.max_new_tokens", found=self.max_new_tokens, expected=expected)
        if 0 < self.dual_clip <= 1 + self.clip_high:
            what, expected = "the bound of dual clipping lies within the clipping", f"more than {1 + self.clip_high:g}"
            raise InputError(what, where="objective.dual_clip", found=self.dual_clip, expected=f"{expected}, or 0")
        if dropout:
            what = "under dropout log-probabilities do not repeat"
            raise InputError(what, where="dropout", found=dropout, expected=0)


@dataclass(frozen=True)
class GRPOConfig(FeedbackConfig):
    """Policy gradient with the other answers to a prompt as baseline: GRPO, Dr. GRPO, RLOO."""

    name: Literal["grpo"] = "grpo"
    """Group-relative policy optimization."""
    baseline: Literal["std", "mean", "leave-one-out"] = "std"
    """Advantage of an answer. std: (r - mean) / std of its group (GRPO); mean: r - mean (Dr. GRPO); leave-one-out:
    r - mean of the others (RLOO)."""
    average: Literal["tokens", "answers", "length"] = "tokens"
    """Mean of the loss. tokens: over all tokens of the batch (DAPO); answers: of the answers' means (GRPO); length: the
    sum over answers x max_new_tokens (Dr. GRPO)."""

    policy: Literal["ppo", "gspo", "cispo"] = "ppo"
    """Policy loss. ppo: clipped ratio per token; gspo: of the answer's mean log-ratio (average answers, clip_low and
    clip_high about 4e-4); cispo: the ratio, at most 1 + clip_high, weighs the log-probability, without a gradient."""

    def check(self, batch_size: int, context: int, dropout: float) -> None:
        """As `FeedbackConfig.check`.

        Raises:
            InputError: also a group of one answer, whose advantage is always 0; dual clipping of CISPO.
        """
        super().check(batch_size, context, dropout)
        if self.policy == "cispo" and self.dual_clip:
            what, where = "CISPO has no dual clipping", "objective.dual_clip"
            raise InputError(what, where=where, found=self.dual_clip, expected="0 with policy cispo")
        if self.samples < 2:
            what = "a group of one answer has no baseline"
            raise InputError(what, where="objective.samples", found=self.samples, expected="2 or more")


@dataclass(frozen=True)
class PPOConfig(FeedbackConfig):
    """Proximal policy optimization: policy, value model, reference, rewards."""

    name: Literal["ppo"] = "ppo"
    """Proximal policy optimization."""
    samples: int = field(default=1, metadata={"min": 1})
    """Answers per prompt."""
    epochs: int = field(default=4, metadata={"min": 1})
    """Epochs over a rollout."""
    kl: Literal["none", "k1", "k2", "k3"] = "k1"
    """KL to the start model. k1: subtracted from the reward; k2 (reverse KL) and k3 (forward KL): in the loss."""
    beta: float = field(default=0.05, metadata={"min": 0})
    """Coefficient of the KL, at the beginning where it is adaptive."""
    kl_target: float = field(default=0.0, metadata={"min": 0})
    """Nats per answer that the adaptive coefficient aims at; 0: the coefficient is fixed."""
    kl_horizon: float = field(default=10_000.0, metadata={"above": 0})
    """Answers in which an adaptive coefficient changes by a fifth."""
    gamma: float = field(default=1.0, metadata={"min": 0, "max": 1})
    """Discount per token."""
    lam: float = field(default=0.95, metadata={"min": 0, "max": 1})
    """Lambda of generalized advantage estimation."""
    critic: Literal["own", "shared"] = "own"
    """Value model. own: with a backbone of its own, as InstructGPT has it; shared: a head on the policy's."""
    critic_from: str = ""
    """Reward model that the value model starts from; the policy's backbone and a new head unless given."""
    critic_rate: float = field(default=1.0, metadata={"above": 0})
    """Learning rate of the value model, or of its head, as a multiple of optim.lr."""
    value_clip: float = field(default=0.2, metadata={"above": 0})
    """Values are clipped to within so much of the old ones."""
    value_weight: float = field(default=0.1, metadata={"min": 0})
    """Factor of the value loss."""
    text: tuple[Source, ...] = ()
    """Pretraining text mixed in; none unless given."""
    text_weight: float = field(default=1.0, metadata={"min": 0})
    """Factor of its loss, nats per token (InstructGPT's gamma)."""
    average_decay: float = field(default=0.0, metadata={"min": 0, "below": 1})
    """Decay per step of an exponential average of the weights, OUT/average (InstructGPT: 0.992); 0: none."""

    @property
    def has_critic(self) -> bool:  # type: ignore[override]
        """Whether the value model has a backbone of its own."""
        return self.critic == "own"

    @property
    def has_average(self) -> bool:  # type: ignore[override]
        """Whether an average of the weights is kept."""
        return self.average_decay > 0

    def __post_init__(self) -> None:
        if self.kl_target and self.kl != "k1":
            what = "an adaptive coefficient is one of the KL in the reward"
            raise InputError(what, where="kl", found=self.kl, expected="k1 with kl_target")
        if self.critic_from and self.critic == "shared":
            what, fix = "a value head on the policy starts from no reward model", "--objective.critic own"
            raise InputError(what, where="critic_from", found=self.critic_from, expected="none with shared", fix=fix)
        if self.kl_target and not self.beta:
            what = "an adaptive coefficient is multiplied, and stays 0"
            raise InputError(what, where="beta", found=self.beta, expected="more than 0 with kl_target")
