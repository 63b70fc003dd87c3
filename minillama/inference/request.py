"""Generation requests, and their place in the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from minillama.inference.sampling import Sampler, Sampling
from minillama.tokenizer.blanks import Layout

GREEDY = Sampling(temperature=0)

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(eq=False)
class Request:
    """Generation request, and its result as far as it is.

    Args:
        prompt: token ids, at least one; or the layout of an infilling prompt, whose last span is continued.
        max_new_tokens: at most so many.
        sampling: how tokens are chosen.
        seed: of the random choices; `sampling.seed` unless given.
        stop_ids: tokens that end it; the last of `tokens` then.
        stop: called with the new tokens so far; whether they end it, as for stop strings.
        logprobs: keep ln p of each token, of the model's distribution before temperature and the other settings.
        tokens: the new ones.
        log_probabilities: of these, where `logprobs` is set.
        finish_reason: why it ended: `stop`, `length`, `context` (the model's is full), `cancelled`; None before.
    """

    prompt: Sequence[int] | Layout
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop: Callable[[Sequence[int]], bool] | None = None
    logprobs: bool = False
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Row:
    """Request in the engine: all its ids and position ids, how many of them the state has, and its sampler."""

    def __init__(self, request: Request, context: int, vocab_size: int, group: int) -> None:
        prompt = request.prompt
        self.request, self.group = request, group
        self.layout = prompt if isinstance(prompt, Layout) else None
        self.ids = list(prompt.tokens if isinstance(prompt, Layout) else prompt)
        self.places = list(prompt.positions) if isinstance(prompt, Layout) else []
        self.context, self.limit = context, min(context, len(self.ids) + request.max_new_tokens)
        self.read = 0
        seed = request.sampling.seed if request.seed is None else request.seed
        self.sampler = Sampler(request.sampling, [self.ids], vocab_size, [seed])

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.request.finish_reason is not None

    def append(self, token: int, log_probability: float | None) -> None:
        """Take a new token."""
        request = self.request
        self.read = len(self.ids)
        self.ids.append(token)
        request.tokens.append(token)
        if log_probability is not None:
            request.log_probabilities.append(log_probability)
        if self.places:
            place, within = self.places[-1]
            self.places.append((place, within + 1))

    def end_if_done(self) -> None:
        """End the request if the last token is its last."""
        request, token = self.request, self.request.tokens[-1]
        if token in request.stop_ids or (request.stop is not None and request.stop(request.tokens)):
            request.finish_reason = "stop"
        elif len(request.tokens) >= request.max_new_tokens:
            request.finish_reason = "length"
        elif len(self.ids) >= self.limit:
            request.finish_reason = "context"
