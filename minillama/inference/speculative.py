"""Speculative decoding of one sequence: a cheap draft of several tokens, verified by the model in one pass.

The output distribution is that of plain decoding, whatever the draft (Leviathan et al. 2023, arXiv 2211.17192): a
draft costs or saves time and changes nothing else. Two kinds of draft: `PromptLookup` copies from the sequence so
far, `DraftModel` samples from a smaller model.

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
    """Acceptance statistics.

    `tokens` are those emitted, drafted or not; `passes` are the model's, not the draft's.
    """

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    tokens: int = 0

    @property
    def rate(self) -> float:
        """Acceptance rate: accepted / drafted; 0 without a draft."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def __str__(self) -> str:
        """One-line summary."""
        each = self.tokens / self.passes if self.passes else 0.0
        return (
            f"{self.accepted} of {self.drafted} drafted tokens accepted ({self.rate:.0%}), {each:.1f} tokens per pass"
        )


class Drafter(Protocol):
    """Draft of the next tokens."""

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> tuple[list[int], Tensor]:
        """Draft of at most `count` tokens, and q (N, V), the distribution of each.

        Args:
            text: all ids so far: those of the previous call and those accepted since.
            count: 0 or more.
            sampler: chain, random generator and a history that may be written to.
        """


class PromptLookup:
    """Prompt lookup decoding (Saxena 2023): the draft is what followed an earlier occurrence of the last n-gram.

    The longest suffix of up to three tokens that occurs earlier is matched, at its most recent occurrence. A copy
    that reaches the end of the sequence continues into itself, as in Lempel-Ziv (1977). q is a point mass.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram -> position after its latest occurrence
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
    """Draft model: a smaller model with the same vocabulary and its own KV cache.

    Args:
        model: the decoder. It drafts nothing beyond its context.
        max_len: maximum sequence length.
        cache_dtype: of keys and values; the model's unless given.
    """

    def __init__(self, model: Decoder, max_len: int, cache_dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.context = model.config.max_seq_len
        self.state = _state(model, max_len, cache_dtype)

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> tuple[list[int], Tensor]:
        """See `Drafter`."""
        count = min(count, self.context + 1 - len(text))  # the last drafted token is not read
        self.state.truncate([len(text) - 1])
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
    """Speculative sampling: the drafted token with probability min(1, p/q), else one from max(p - q, 0), normalized.

    If `token` was drawn from q, the result is distributed as p (Leviathan et al. 2023, theorem in A.1). A
    rejected token has p < q, so that it is never drawn again: the result is `token` where it was accepted.

    Args:
        token: drawn from q.
        p: (V,) target distribution.
        q: (V,) draft distribution.
        generator: random generator.
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
    """Speculative decoding of one prompt: yields [(0, token)] per token, as `decode` does; send {0} to end.

    Greedy tokens are those of `decode`, except where rounding decides between two tokens: a pass over several
    tokens sums in another order than one over each. Sampled ones have `decode`'s distribution and are
    other draws of it.

    Args:
        model: the decoder.
        prompt: at least one id.
        max_new_tokens: tokens at most. The sequence also ends when the context is full.
        sampling: settings of both the model and the draft.
        draft: draft model; prompt lookup unless given.
        draft_tokens: maximum draft length per pass.
        stats: is added to.
        cache_dtype: of keys and values, both models'; their own unless given.

    Raises:
        InputError: a draft of another vocabulary or of no token, an infilling or a recurrent model.
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
    """Empty decode state of one sequence, with rollback.

    Raises:
        InputError: a model that has none.
    """
    if model.config.objective == "glm":
        raise InputError(
            "speculation reads from left to right, and this model fills blanks", fix="decode it without speculation"
        )
    if model.config.mixer == "wkv":
        raise InputError(
            "speculative decoding needs a model with a KV cache", fix="decode this model without speculation"
        )
    return model.state(1, min(model.config.max_seq_len, max_len), cache_dtype)


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
    end = min(end, max(model.config.max_seq_len, len(text) + 1))  # as `decode`: one token even at the limit
    while len(text) < end:
        drafted, q = drafter.propose(text, min(draft_tokens, end - len(text) - 1), sampler.fork())
        with evaluating(model):
            unread = torch.tensor([text[state.lengths[0] :] + drafted], device=model.device)
            hidden = model.hidden(unread, state=state)
            tokens = _checked(model.head(hidden[0, -len(drafted) - 1 :]), drafted, q, sampler)
        state.truncate([len(text) + len(tokens) - 1])
        stats.passes += 1
        stats.drafted += len(drafted)
        stats.accepted += len(tokens) - 1
        for token in tokens:
            text.append(token)
            stats.tokens += 1
            if 0 in ((yield [(0, token)]) or ()):
                return


def _checked(logits: Tensor, drafted: Sequence[int], q: Tensor, sampler: Sampler) -> list[int]:
    """Accepted tokens and one more: in place of the first rejected one, or after them all.

    Args:
        logits: (N + 1, V), of each drafted token's position and the next.
        drafted: N ids.
        q: (N, V), draft distributions.
        sampler: its history is updated with the result.
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
    """Decoding by `speculate` in place of `decode`, for one prompt: `generate(..., decoding=Speculation())`.

    Args:
        draft: draft model; prompt lookup unless given.
        draft_tokens: maximum draft length per pass.
        acceptance: statistics of all calls.
        cache_dtype: of keys and values, both models'; their own unless given.
    """

    draft: Decoder | None = None
    draft_tokens: int = 8
    acceptance: Acceptance = field(default_factory=Acceptance)
    cache_dtype: torch.dtype | None = None

    def __call__(
        self, model: Decoder, prompts: Sequence[Sequence[int] | Layout], max_new_tokens: int, sampling: Sampling
    ) -> Steps:
        """Decoding steps of one prompt.

        Raises:
            InputError: several prompts, or what `speculate` refuses.
        """
        if len(prompts) != 1:
            raise InputError("speculation takes one prompt", found=f"{len(prompts)} prompts")
        prompt = cast(Sequence[int], prompts[0])  # models with layouts are refused
        options = (self.draft, self.draft_tokens, self.acceptance, self.cache_dtype)
        return speculate(model, prompt, max_new_tokens, sampling, *options)
