"""Sampling from logits: pure functions (B, V) -> (B, V), applied in the order of `Sampler`.

A token that is ruled out gets -inf. The only state is that of the random generators, one per row, so
that a row's tokens do not depend on its neighbors.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from minillama.config.loader import build
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
    seed: int = field(default=0, metadata={"min": -(2**63), "max": 2**63 - 1})
    """Of the random choices; prompt i of a batch uses seed + i."""

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken; below 1e-6 logits divided by the temperature may be infinite."""
        return self.temperature < 1e-6


def models_own(given: Sampling, own: Mapping[str, Any]) -> Sampling:
    """Sampling settings of a model, where none is given but a seed; what it leaves out changes nothing.

    Args:
        own: members of its generation_config.json, which count where `do_sample` is set.

    Raises:
        InputError: a member out of range.
    """
    names = {field.name for field in fields(Sampling)} - {"seed"}
    found = {name: own[name] for name in sorted(names) if own.get(name) is not None}
    if not found or not own.get("do_sample") or replace(given, seed=0) != Sampling():
        return given
    settings = build(Sampling, found, None, Sampling(1.0, seed=given.seed), "generation_config")
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in found.items())
    print(f"sampling by the model's own settings, {options}; any of these options replaces all", file=sys.stderr)
    return settings


def distribution(logits: Tensor, settings: Sampling) -> Tensor:
    """Sampling distribution after the whole chain but the penalty: logits (B, V) -> (B, V); greedy: one-hot."""
    if settings.is_greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    logits = temperature(logits, settings.temperature)
    if settings.top_k:
        logits = top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = top_p(logits, settings.top_p)
    if settings.min_p:
        logits = min_p(logits, settings.min_p)
    return logits.softmax(-1)


class Sampler:
    """Sampler of one sequence: settings, random generator, and the tokens seen, for the repetition penalty.

    Args:
        settings: the chain.
        prompt: token ids.
        vocab_size: V.
        seed: that of the settings unless given.
    """

    def __init__(self, settings: Sampling, prompt: Sequence[int], vocab_size: int, seed: int | None = None) -> None:
        self.settings, self.alike = settings, replace(settings, seed=0)  # equal for those that are chosen together
        self.generator = torch.Generator().manual_seed(settings.seed if seed is None else seed)
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[torch.tensor(prompt)] = True

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sampling distribution (V,) after the whole chain, of logits (V,), on the CPU.

        Raises:
            InputError: NaN logits.
        """
        return distribution(_penalized(logits[None], [self]), self.settings)[0]

    def draw(self, probabilities: Tensor) -> int:
        """Token from its distribution (V,)."""
        return int(probabilities.argmax()) if self.settings.temperature == 0 else draw(probabilities[None], [self])[0]

    def take(self, token: int) -> None:
        """Count a token as seen."""
        if self.seen is not None:
            self.seen[token] = True

    def fork(self) -> Sampler:
        """Copy with the same random generator and its own history, for tokens that may be rejected."""
        other = copy(self)
        other.seen = None if self.seen is None else self.seen.clone()
        return other


def draw(probabilities: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Inverse transform sampling: the first token of each row (B, V) whose cumulative probability exceeds u.

    Each sampler draws its u, uniform in [0, 1). A token of probability 0 is never the first.
    """
    sums = probabilities.cumsum(-1)
    uniform = torch.cat([torch.rand(1, generator=sampler.generator) for sampler in samplers])[:, None]
    total = sums[:, -1:]  # 1 but for rounding
    aims = torch.minimum(uniform * total, total.nextafter(torch.zeros(())))
    return torch.searchsorted(sums, aims, right=True)[:, 0].tolist()


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Batched sampling: logits (B, V) -> one token id per row, counted as seen; equal settings together.

    Raises:
        InputError: NaN logits, which a broken model gives.
    """
    groups: dict[Sampling, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler.alike, []).append(row)
    tokens = [0] * len(samplers)
    for settings, rows in groups.items():
        group = [samplers[row] for row in rows]
        penalized = _penalized(logits if len(rows) == len(samplers) else logits[rows], group)
        if settings.is_greedy:  # `max` is twice as fast as `argmax`, and its index too is the first of equals
            chosen = penalized.max(-1).indices.tolist()
        else:
            chosen = draw(distribution(penalized, settings), group)
        for row, sampler, token in zip(rows, group, chosen, strict=True):
            sampler.take(token)
            tokens[row] = token
    return tokens


def _penalized(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Logits (B, V) in float32 on the CPU, after the repetition penalty of samplers with equal settings."""
    logits = logits.float().cpu()
    if logits.amax().isnan():  # which is NaN if anything is
        raise InputError("the model's logits are not numbers", fix="check its weights: they hold NaN or infinity")
    seen = [sampler.seen for sampler in samplers if sampler.seen is not None]
    if not seen:
        return logits
    return repetition_penalty(logits, torch.stack(seen), samplers[0].settings.repetition_penalty)
