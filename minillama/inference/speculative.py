"""Speculative decoding of one sequence: a cheap draft of several tokens, checked by the model in one pass.

What comes out is distributed as what plain decoding gives, whatever the draft (Leviathan et al. 2023, arXiv
2211.17192): a draft costs or saves time and changes nothing else. Two kinds of draft: `PromptLookup` copies
from the text so far, `DraftModel` asks a smaller model.

Shapes: V vocabulary, N drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.errors import InputError
from minillama.inference.engine import Steps, evaluating
from minillama.inference.request import GREEDY
from minillama.inference.sampling import Sampler, Sampling
from minillama.layers.cache import State
from minillama.model import Decoder
from minillama.tokenizer.blanks import Layout

LONGEST_SUFFIX = 3


@dataclass
class Acceptance:
    """How much of the drafts was of use.

    `tokens` are those that came out, drafted or not; `passes` are the model's, not the draft's.
    """

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    tokens: int = 0

    @property
    def rate(self) -> float:
        """Accepted / drafted; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def __str__(self) -> str:
        """In one line."""
        each = self.tokens / self.passes if self.passes else 0.0
        return (
            f"{self.accepted} of {self.drafted} drafted tokens accepted ({self.rate:.0%}), {each:.1f} tokens per pass"
        )


class Drafter(Protocol):
    """Guesses how a text goes on."""

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> tuple[list[int], Tensor]:
        """At most `count` tokens, and q (N, V), what each was drawn from.

        Args:
            text: all ids so far; those of the call before and what was accepted since.
            count: 0 or more.
            sampler: chain, random generator and a history that may be written to.
        """


class PromptLookup:
    """Copies what followed the text's last words when they were there before (Saxena 2023, prompt lookup decoding).

    The longest suffix of up to three tokens that occurs earlier decides, and of its occurrences the most recent.
    A copy that reaches the end of the text runs on into itself, as Lempel-Ziv's (1977) do. q is a point mass.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram -> where its most recent follower stands
        self.indexed = 1

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> tuple[list[int], Tensor]:
        """See `Drafter`."""
        for place in range(self.indexed, len(text)):
            for n in range(1, min(LONGEST_SUFFIX, place) + 1):
                self.follows[tuple(text[place - n : place])] = place
        self.indexed = len(text)
        suffixes = (tuple(text[-n:]) for n in range(min(LONGEST_SUFFIX, len(text)), 0, -1))
        place = next((self.follows[suffix] for suffix in suffixes if suffix in self.follows), len(text))
        copied = text[place:]
        tokens = [copied[i % len(copied)] for i in range(count)] if copied else []
        return tokens, F.one_hot(torch.tensor(tokens, dtype=torch.long), self.vocab_size).float()


class DraftModel:
    """A smaller model with the same vocabulary and a state of its own.

    Args:
        model: the decoder. Where the text outgrows its context, it drafts nothing.
        max_len: tokens that the text can have.
        cache_dtype: of keys and values; the model's unless given.
    """

    def __init__(self, model: Decoder, max_len: int, cache_dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.context = model.config.max_seq_len
        self.state = _state(model, max_len, cache_dtype)

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> tuple[list[int], Tensor]:
        """See `Drafter`."""
        count = min(count, self.context + 1 - len(text))  # the last token of a draft is not read
        self.state.truncate(len(text) - 1)
        unread = list(text[self.state.lengths[0] :])
        tokens: list[int] = []
        drawn_from = [torch.empty(0, self.model.config.vocab_size)]
        with evaluating(self.model):
            for _ in range(count):
                hidden = self.model.hidden(torch.tensor([unread], device=self.model.device), state=self.state)
                q = sampler.probabilities(self.model.head(hidden[:, -1]))
                token = sampler.draw(q)
                sampler.take(token)
                unread = token.tolist()
                tokens += unread
                drawn_from.append(q)
        return tokens, torch.cat(drawn_from)


def accept(token: int, p: Tensor, q: Tensor, generator: torch.Generator) -> int:
    """The token that takes a drafted one's place: itself with probability min(1, p/q), else of max(p - q, 0), scaled.

    If `token` was drawn from q, the result is distributed as p (Leviathan et al. 2023, theorem in A.1). A
    rejected token has p < q, so that it is never drawn again: the result is `token` where it was accepted.

    Args:
        token: drawn from q.
        p: (V,) what the token should be drawn from.
        q: (V,) what it was drawn from.
        generator: of the random choices.
    """
    if float(torch.rand((), generator=generator, dtype=torch.float64)) * float(q[token]) < float(p[token]):
        return token
    rest = (p - q).clamp(min=0)
    # rest is empty where p and q differ by rounding alone
    return int(torch.multinomial(rest if rest.sum() > 0 else p, 1, generator=generator))


def speculate(
    model: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    draft: Decoder | None = None,
    draft_tokens: int = 8,
    stats: Acceptance | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Steps:
    """Yield [(0, token)], token by token, as `decode` does for one prompt; send {0} to end.

    Greedy tokens are those of `decode`, but where rounding decides between two tokens: a pass over several
    tokens adds up in another order than one over each. Sampled ones have `decode`'s distribution and are
    other draws of it.

    Args:
        model: the decoder.
        prompt: at least one id.
        max_new_tokens: tokens at most. The text also ends when the model's context is full.
        sampling: how tokens are chosen; the draft's are chosen the same way.
        draft: a model that drafts; prompt lookup unless given.
        draft_tokens: drafted before each pass at most.
        stats: is added to.
        cache_dtype: of keys and values, both models'; their own unless given.

    Raises:
        InputError: a draft of another vocabulary or of no token, a model that fills blanks or is recurrent.
    """
    vocab_size, end = model.config.vocab_size, len(prompt) + max_new_tokens
    if draft_tokens < 1:
        raise InputError("a draft of no token", where="draft_tokens", found=draft_tokens, expected="1 or more")
    if draft is not None and draft.config.vocab_size != vocab_size:
        raise InputError(
            "the draft model has another vocabulary",
            found=f"{draft.config.vocab_size} tokens",
            expected=f"{vocab_size}, the model's",
            fix="give a draft model that was trained with the same tokenizer",
        )
    drafter = PromptLookup(vocab_size) if draft is None else DraftModel(draft, end, cache_dtype)
    sampler, state = Sampler(sampling, [prompt], vocab_size), _state(model, end, cache_dtype)
    return _steps(model, state, list(prompt), end, sampler, drafter, draft_tokens, stats or Acceptance())


def _state(model: Decoder, max_len: int, cache_dtype: torch.dtype | None) -> State:
    """An empty decode state for one row that can go back.

    Raises:
        InputError: a model that has none.
    """
    if model.config.objective == "glm":
        raise InputError(
            "speculation reads from left to right, and this model fills blanks", fix="decode it without speculation"
        )
    state = model.state(1, min(model.config.max_seq_len, max_len), cache_dtype)
    state.truncate(0)  # a recurrent state refuses at once
    return state


def _steps(
    model: Decoder,
    state: State,
    text: list[int],
    end: int,
    sampler: Sampler,
    drafter: Drafter,
    draft_tokens: int,
    stats: Acceptance,
) -> Steps:
    end = min(end, max(model.config.max_seq_len, len(text) + 1))  # as `decode`: one token comes before the limit
    while len(text) < end:
        drafted, q = drafter.propose(text, min(draft_tokens, end - len(text) - 1), sampler.fork())
        with evaluating(model):
            unread = torch.tensor([text[state.lengths[0] :] + drafted], device=model.device)
            hidden = model.hidden(unread, state=state)
            tokens = _checked(model.head(hidden[0, -len(drafted) - 1 :]), drafted, q, sampler)
        state.truncate(len(text) + len(tokens) - 1)
        stats.passes += 1
        stats.drafted += len(drafted)
        stats.accepted += len(tokens) - 1
        for token in tokens:
            text.append(token)
            stats.tokens += 1
            if 0 in ((yield [(0, token)]) or ()):
                return


def _checked(logits: Tensor, drafted: Sequence[int], q: Tensor, sampler: Sampler) -> list[int]:
    """The accepted tokens and one more: in place of the first that was rejected, or behind them all.

    Args:
        logits: (N + 1, V), of each drafted token's place and the one behind.
        drafted: N ids.
        q: (N, V), what they were drawn from.
        sampler: its history takes in the result.
    """
    logits = logits.float().cpu()
    tokens: list[int] = []
    for i, token in enumerate(drafted):
        tokens.append(accept(token, sampler.probabilities(logits[i : i + 1])[0], q[i], sampler.generators[0]))
        sampler.take(torch.tensor(tokens[-1:]))
        if tokens[-1] != token:
            return tokens
    return tokens + sampler(logits[-1:]).tolist()


@dataclass(frozen=True)
class Speculation:
    """`speculate` in place of `decode`, for one prompt: `generate(..., decoding=Speculation())`.

    Args:
        draft: a model that drafts; prompt lookup unless given.
        draft_tokens: drafted before each pass at most.
        acceptance: counts all that is decoded with this.
        cache_dtype: of keys and values, both models'; their own unless given.
    """

    draft: Decoder | None = None
    draft_tokens: int = 8
    acceptance: Acceptance = field(default_factory=Acceptance)
    cache_dtype: torch.dtype | None = None

    def __call__(
        self, model: Decoder, prompts: Sequence[Sequence[int] | Layout], max_new_tokens: int, sampling: Sampling
    ) -> Steps:
        """The steps of one prompt.

        Raises:
            InputError: several prompts, or what `speculate` refuses.
        """
        if len(prompts) != 1:
            raise InputError("speculation takes one prompt", found=f"{len(prompts)} prompts")
        prompt = cast(Sequence[int], prompts[0])  # models with layouts are refused
        options = (self.draft, self.draft_tokens, self.acceptance, self.cache_dtype)
        return speculate(model, prompt, max_new_tokens, sampling, *options)
