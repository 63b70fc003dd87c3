"""Generation requests, and their rows and batches in the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from minillama.errors import InputError
from minillama.inference.sampling import Sampler, Sampling
from minillama.layers.cache import State
from minillama.tokenizer.blanks import Layout

GREEDY = Sampling(temperature=0)

FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]


def check_ids(ids: Sequence[int], vocab_size: int, where: str | None = None) -> None:
    """Refuse a token id that is none of the model's."""
    if (wrong := next((token for token in ids if not 0 <= token < vocab_size), None)) is not None:
        what, expected = "a token id outside the vocabulary", f"ids of 0 to {vocab_size - 1}"
        raise InputError(what, where=where, found=wrong, expected=expected)


@dataclass(eq=False)
class Request:
    """Generation request, and its result as far as it is.

    Args:
        prompt: token ids, at least one; or the layout of an infilling prompt, whose last span is continued.
        max_new_tokens: at most so many.
        sampling: how tokens are chosen.
        seed: of the random choices; `sampling.seed` unless given.
        stop_ids: tokens that end it; the last of `tokens` then.
        stop: called once per token with the new tokens so far, but for one of `stop_ids`; whether they end it, as for
            stop strings.
        logprobs: keep ln p of each token, of the model's distribution before temperature and the other settings.
        tokens: the new ones.
        log_probabilities: of these, where `logprobs` is set.
        finish_reason: `eos` (one of `stop_ids`), `stop` (the condition), `length` (max_new_tokens), `context` (the
            model's is full), `cancelled`; None before it ends.
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

    @property
    def ids(self) -> Sequence[int]:
        """Token ids of the prompt."""
        return self.prompt.tokens if isinstance(self.prompt, Layout) else self.prompt


class Row:
    """Request in the engine: all its ids and position ids, how many of them the state has, and its sampler.

    `first` is the first of several samples of one prompt.
    """

    def __init__(self, request: Request, context: int, vocab_size: int, first: Request) -> None:
        self.request, self.first = request, first
        self.layout = request.prompt if isinstance(request.prompt, Layout) else None
        self.ids = list(request.ids)
        self.positions = list(self.layout.positions) if self.layout is not None else []
        self.limit = min(context, len(self.ids) + request.max_new_tokens)
        self.read = 0
        self.sampler = Sampler(request.sampling, self.ids, vocab_size, request.seed)

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.request.finish_reason is not None

    def append(self, token: int, log_probability: float | None = None) -> None:
        """Append a new token."""
        self.read = len(self.ids)
        self.ids.append(token)
        self.request.tokens.append(token)
        if log_probability is not None:
            self.request.log_probabilities.append(log_probability)
        if self.positions:
            position, within = self.positions[-1]
            self.positions.append((position, within + 1))

    def end_if_done(self) -> None:
        """End the request if the last token is its last."""
        request, token = self.request, self.request.tokens[-1]
        if token in request.stop_ids:
            request.finish_reason = "eos"
        elif request.stop is not None and request.stop(request.tokens):
            request.finish_reason = "stop"
        elif len(request.tokens) >= request.max_new_tokens:
            request.finish_reason = "length"
        elif len(self.ids) >= self.limit:
            request.finish_reason = "context"


@dataclass
class Batch:
    """Rows and their decode state.

    Attributes:
        samples: in a batch of prompts, the requests that share each row.
        logits: (B, V) behind the tokens that have been read.
    """

    rows: list[Row]
    state: State
    samples: Sequence[Sequence[Row]] = ()
    logits: Tensor | None = None

    def unfinished(self) -> list[Row]:
        """Rows of requests that have not ended."""
        return [row for same in self.samples or [self.rows] for row in same if not row.finished]

    def select(self, indices: Sequence[int]) -> None:
        """Keep these rows, in this order; a repeated row is copied."""
        if [*indices] == [*range(len(self.rows))]:
            return
        self.rows = [self.rows[i] for i in indices]
        self.state.select(indices)
        if self.logits is not None:
            self.logits = self.logits[indices]
