"""Sampling from logits: pure functions (B, V) -> (B, V), applied in the order of `Sampler`.

A token that is ruled out gets -inf. The only state is that of the random generators, one per row, so
that a row's tokens do not depend on its neighbors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minillama.errors import InputError

OUT = float("-inf")


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty: divides positive logits of seen tokens by `penalty`, multiplies negative ones by it.

    Keskar et al. 2019, arXiv 1909.05858, §4.1, in the form adopted for negative logits.

    Args:
        logits: (B, V).
        seen: (B, V) booleans, true for the tokens of prompt and output so far.
        penalty: 1 changes nothing, 1.1 to 1.3 is usual.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def temperature(logits: Tensor, value: float) -> Tensor:
    """Temperature: logits / value, value > 0."""
    return logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Top-k sampling: keeps the k largest logits per row, and any that equal the k-th."""
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < kth, OUT)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus (top-p) sampling: keeps the most probable tokens until their sum exceeds p, with the one that crosses it.

    Token i of the sorted row is removed when cumsum_i - p_i > p (Holtzman et al. 2020, arXiv 1904.09751,
    §3.1; Meta's llama/generation.py).
    """
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    drop = probabilities.cumsum(-1) - probabilities > p
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), OUT)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Min-p sampling: removes tokens less probable than p times the top one. Nguyen et al. 2024, arXiv 2407.01082."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), OUT)


def row_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """Random generators, one per row: a row alone draws what it draws in a batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings."""

    temperature: float = field(default=0.8, metadata={"min": 0})
    """Divides the logits; 0 takes the most probable token (greedy)."""
    top_k: int = field(default=0, metadata={"min": 0})
    """Keep only the K most probable tokens; 0 keeps all."""
    top_p: float = field(default=1.0, metadata={"above": 0, "max": 1})
    """Keep the most probable tokens that together exceed P."""
    min_p: float = field(default=0.0, metadata={"min": 0, "max": 1})
    """Drop tokens less probable than P times the most probable."""
    repetition_penalty: float = field(default=1.0, metadata={"above": 0})
    """Over 1 makes tokens that were already there less likely."""
    seed: int = 0
    """Of the random choices; prompt i of a batch uses seed + i."""


class Sampler:
    """Sampler of one token per row.

    Args:
        settings: the chain.
        prompts: token ids of each row's prompt, for the repetition penalty.
        vocab_size: V.
        seeds: one per row; seed + i for row i unless given.
    """

    def __init__(
        self,
        settings: Sampling,
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.settings = settings
        self.generators = row_generators(seeds or [settings.seed + row for row in range(len(prompts))])
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, V) -> token ids (B,), on the CPU.

        Raises:
            InputError: NaN logits, which a broken model gives.
        """
        logits = self._penalized(logits)
        # `max` is twice as fast as `argmax`, and its index too is the first of equals
        tokens = logits.max(-1).indices if self.settings.temperature == 0 else self.draw(self._chain(logits))
        self.take(tokens)
        return tokens

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sampling distribution after the whole chain: logits (B, V) -> (B, V) on the CPU; greedy: one-hot.

        Raises:
            InputError: NaN logits, which a broken model gives.
        """
        logits = self._penalized(logits)
        if self.settings.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
        return self._chain(logits)

    def _penalized(self, logits: Tensor) -> Tensor:
        logits = logits.float().cpu()
        if logits.amax().isnan():  # which is NaN if anything is
            raise InputError("the model's logits are not numbers", fix="check its weights: they hold NaN or infinity")
        if self.seen is None:
            return logits
        return repetition_penalty(logits, self.seen, self.settings.repetition_penalty)

    def _chain(self, logits: Tensor) -> Tensor:
        s = self.settings
        logits = temperature(logits, s.temperature)
        if s.top_k:
            logits = top_k(logits, s.top_k)
        if s.top_p < 1:
            logits = top_p(logits, s.top_p)
        if s.min_p:
            logits = min_p(logits, s.min_p)
        return logits.softmax(-1)

    def draw(self, probabilities: Tensor) -> Tensor:
        """One token per row, (B,), from (B, V)."""
        if self.settings.temperature == 0:
            return probabilities.argmax(-1)
        rows = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probabilities, self.generators, strict=True)
        ]
        return torch.cat(rows)

    def take(self, tokens: Tensor) -> None:
        """Count tokens (B,) as seen."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)

    def fork(self) -> Sampler:
        """Copy with the same chain and random generators and its own history, for tokens that may be rejected."""
        other = copy(self)
        other.seen = None if self.seen is None else self.seen.clone()
        return other


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Batched sampling: logits (B, V) -> token ids (B,), one sampler per row; equal settings together."""
    groups: dict[Sampling, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(replace(sampler.settings, seed=0), []).append(row)
    tokens = torch.empty(len(samplers), dtype=torch.long)
    for rows in groups.values():
        together = copy(samplers[rows[0]])
        together.generators = [samplers[row].generators[0] for row in rows]
        seen = [sampler.seen for sampler in (samplers[row] for row in rows) if sampler.seen is not None]
        together.seen = torch.cat(seen) if seen else None
        tokens[rows] = together(logits if len(rows) == len(samplers) else logits[rows])
        for row in rows:
            samplers[row].take(tokens[row : row + 1])
    return tokens
