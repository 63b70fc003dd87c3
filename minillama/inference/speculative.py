"""Speculative decoding: a cheap draft of several tokens per sequence, verified by the model in one pass.

The output distribution is that of plain decoding, whatever the draft (Leviathan et al. 2023, arXiv 2211.17192): a
draft costs or saves time and changes nothing else. Two kinds of draft: `PromptLookup` copies from the sequence so
far, `DraftModel` samples from a smaller model.

Shapes: V vocabulary, N drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.errors import InputError
from minillama.inference.request import Row
from minillama.inference.sampling import Sampler, choose
from minillama.layers.cross_entropy import log_probabilities
from minillama.model import Decoder

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
        accepted = f"{self.accepted} of {self.drafted} drafted tokens accepted ({self.rate:.0%})"
        return f"{accepted}, {each:.1f} tokens per pass"


class Draft(NamedTuple):
    """Drafted tokens, N ids, and their draft distributions q (N, V)."""

    tokens: list[int]
    q: Tensor


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

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> Draft:
        """Draft of at most `count` tokens after all ids so far: those of the previous call and those accepted since."""
        for end in range(self.indexed, len(text)):
            for n in range(1, min(LONGEST_SUFFIX, end) + 1):
                self.follows[tuple(text[end - n : end])] = end
        self.indexed = len(text)
        suffixes = (tuple(text[-n:]) for n in range(min(LONGEST_SUFFIX, len(text)), 0, -1))
        start = next((self.follows[suffix] for suffix in suffixes if suffix in self.follows), len(text))
        copied = text[start:]
        tokens = [copied[i % len(copied)] for i in range(count)] if copied else []
        return Draft(tokens, F.one_hot(torch.tensor(tokens, dtype=torch.long), self.vocab_size).float())


class DraftModel:
    """Draft model: a smaller model with the same vocabulary and its own KV cache.

    Args:
        model: the decoder. It drafts nothing beyond its context.
        max_len: maximum sequence length.
        cache_dtype: of keys and values; the model's unless given.
    """

    def __init__(self, model: Decoder, max_len: int, cache_dtype: torch.dtype | None = None) -> None:
        self.model, self.context = model, model.config.max_seq_len
        self.state = model.state(1, min(self.context, max_len), cache_dtype)

    def propose(self, text: Sequence[int], count: int, sampler: Sampler) -> Draft:
        """Draft as by `PromptLookup.propose`, with this sampler, whose history is the draft's own."""
        count = min(count, self.context + 1 - len(text))  # the last drafted token is not read
        self.state.truncate([len(text) - 1])
        unread = list(text[self.state.lengths[0] :])
        tokens: list[int] = []
        drawn_from = [torch.empty(0, self.model.config.vocab_size)]
        for _ in range(count):
            hidden = self.model.hidden(torch.tensor([unread], device=self.model.device), state=self.state)
            q = sampler.probabilities(self.model.head(hidden[0, -1]))
            tokens.append(sampler.draw(q))
            sampler.take(tokens[-1])
            unread = tokens[-1:]
            drawn_from.append(q[None])
        return Draft(tokens, torch.cat(drawn_from))


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


@dataclass
class Speculation:
    """Speculative decoding in an engine: `Engine(model, speculation=Speculation(draft))`.

    Greedy tokens are those of plain decoding, except where rounding decides between two tokens: a pass over several
    tokens sums in another order than one over each. Sampled ones have the same distribution and are other draws of it.

    Args:
        draft: draft model, which drafts for one row after the other; prompt lookup unless given.
        draft_tokens: maximum draft length per pass.
        acceptance: statistics of all requests.
    """

    draft: Decoder | None = None
    draft_tokens: int = 8
    acceptance: Acceptance = field(default_factory=Acceptance)

    def __post_init__(self) -> None:
        self.drafters: WeakKeyDictionary[Row, PromptLookup | DraftModel] = WeakKeyDictionary()

    def check(self, model: Decoder) -> None:
        """Refuse models that cannot speculate together.

        Raises:
            InputError: a draft model of another vocabulary, a draft of no token, an infilling or a recurrent model.
        """
        if self.draft_tokens < 1:
            raise InputError("a draft of no token", where="draft_tokens", found=self.draft_tokens, expected="1 or more")
        for each in (model, self.draft or model):
            if each.config.objective == "glm" or each.config.mixer == "wkv":
                what = "speculative decoding needs a left-to-right model with a KV cache"
                found = "an infilling model" if each.config.objective == "glm" else "a recurrent model"
                raise InputError(what, found=found, fix="decode it without speculation")
            if each.config.vocab_size != model.config.vocab_size:
                raise InputError(
                    "the draft model has another vocabulary",
                    found=f"{each.config.vocab_size} tokens",
                    expected=f"{model.config.vocab_size}, the model's",
                    fix="give a draft model that was trained with the same tokenizer",
                )

    def propose(self, row: Row, vocab_size: int, cache_dtype: torch.dtype | None) -> Draft:
        """Draft of the next tokens of a row by its own drafter, none beyond its limit; `cache_dtype` as of `Engine`."""
        if row not in self.drafters and self.draft is not None:
            self.drafters[row] = DraftModel(self.draft, row.limit, cache_dtype)
        drafter = self.drafters.setdefault(row, PromptLookup(vocab_size))
        count = max(0, min(self.draft_tokens, row.limit - len(row.ids) - 1))
        return drafter.propose(row.ids, count, row.sampler.fork())

    def verify(self, row: Row, draft: Draft, logits: Tensor) -> None:
        """Append the accepted tokens and one more, in place of the first rejected one or after them all.

        Logits (N + 1, V) are those of each drafted token's position and the next.
        """
        tokens = _accepted(logits.float().cpu(), draft, row.sampler)
        self.acceptance.passes += 1
        self.acceptance.drafted += len(draft.tokens)
        self.acceptance.accepted += len(tokens) - 1
        ids = torch.tensor(tokens, device=logits.device)
        kept = log_probabilities(logits[: len(tokens)], ids).tolist() if row.request.logprobs else [None] * len(tokens)
        for token, log_probability in zip(tokens, kept, strict=True):
            row.append(token, log_probability)
            self.acceptance.tokens += 1
            row.end_if_done()
            if row.finished:
                return


def _accepted(logits: Tensor, draft: Draft, sampler: Sampler) -> list[int]:
    """Accepted tokens and one more; the sampler's history is updated with them."""
    tokens: list[int] = []
    for i, token in enumerate(draft.tokens):
        tokens.append(accept(token, sampler.probabilities(logits[i]), draft.q[i], sampler.generator))
        sampler.take(tokens[-1])
        if tokens[-1] != token:
            return tokens
    return tokens + choose(logits[-1:], [sampler])
