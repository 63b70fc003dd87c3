"""The decode loop on token ids: prompts of unequal length in one batch, waiting ones entering where others ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minillama.config.cost import cache_slots
from minillama.inference.sampling import Sampler, Sampling
from minillama.layers.cache import State
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.tokenizer.blanks import Layout

Steps = Generator[list[tuple[int, int]], set[int] | None, None]
GREEDY = Sampling(temperature=0)


class Decoding(Protocol):
    """What makes the tokens: the yields and sends of `decode`. `speculation.Speculation` is one."""

    def __call__(
        self, model: Decoder, prompts: Sequence[Sequence[int] | Layout], max_new_tokens: int, sampling: Sampling
    ) -> Steps:
        """The steps of these prompts."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients, and as before afterwards."""
    training = model.training
    if training:  # to tell every module takes longer than a token of a small model
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


class Request:
    """One prompt on its way: ids so far, their places in a text with blanks, and what has not been read yet.

    Raises:
        ValueError: a prompt longer than the context.
    """

    def __init__(self, prompt: Sequence[int] | Layout, max_new_tokens: int, context: int) -> None:
        self.layout = prompt if isinstance(prompt, Layout) else None
        self.ids = list(prompt.tokens if isinstance(prompt, Layout) else prompt)
        self.places = list(prompt.places) if isinstance(prompt, Layout) else []
        if len(self.ids) > context:
            raise ValueError(f"a prompt of {len(self.ids)} tokens is longer than the model's context of {context}")
        self.limit = min(context, len(self.ids) + max_new_tokens)
        self.read = 0

    def append(self, token: int) -> None:
        """Take a new token."""
        self.ids.append(token)
        if self.places:
            place, within = self.places[-1]
            self.places.append((place, within + 1))

    @property
    def is_full(self) -> bool:
        """Whether no more tokens may come."""
        return len(self.ids) >= self.limit


@dataclass
class RunningBatch:
    """Rows that share every pass.

    Args:
        rows: which prompts they are.
        state: what of them has been read, None where each step reads all of it.
        sampler: how their tokens are chosen.
    """

    rows: list[int]
    state: State | None
    sampler: Sampler

    def select(self, places: Sequence[int]) -> None:
        """Keep the rows at some places, in their order."""
        self.rows = [self.rows[place] for place in places]
        self.sampler.select(places)
        if self.state is not None:
            self.state.select(places)

    def replace(self, places: Sequence[int], other: RunningBatch) -> None:
        """Put the rows of another batch at these places."""
        self.sampler.replace(places, other.sampler)
        if self.state is not None and other.state is not None:
            self.state.replace(places, other.state)
        for place, row in zip(places, other.rows, strict=True):
            self.rows[place] = row


def decode(
    model: Decoder,
    prompts: Sequence[Sequence[int] | Layout],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    use_state: bool = True,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    cache_dtype: torch.dtype | None = None,
    window: int | None = None,
    sinks: int = 0,
) -> Steps:
    """Yield, step by step, (row, token) for rows that are still going.

    Send a set of rows into the generator to end them. A prompt that waits takes the place of a row that has ended:
    it is read in a pass of its own, and from then on shares the batch (Orca, Yu et al. 2022, iteration-level
    scheduling). What a row says does not depend on its neighbors, but for rounding.

    Args:
        model: the decoder.
        prompts: token ids, one sequence a row, each at least one token long; or for all rows texts with
            blanks, of which the last is filled.
        max_new_tokens: tokens per row at most. A row also ends when the model's context is full.
        sampling: how tokens are chosen.
        use_state: keep keys and values between steps. Without, each step reads everything again; the
            tokens are the same, and a test holds the two against each other.
        seeds: of each row's random choices; `sampling.seed` + i for row i unless given.
        batch_size: rows at once; all unless given.
        cache_dtype: of keys and values: the model's type unless given, a shorter float, or int8.
        window: a token sees the last `window` tokens, its own included; all unless given.
        sinks: and the first `sinks` ones, which a model leans on whatever they say (Xiao et al. 2023, arXiv
            2309.17453).

    Raises:
        ValueError: a prompt longer than the context.
    """
    texts = [Request(prompt, max_new_tokens, model.config.max_seq_len) for prompt in prompts]
    seeds = seeds or [sampling.seed + row for row in range(len(prompts))]
    passes = _Passes(model, texts, sampling, seeds, use_state, cache_dtype, Mask(window=window, sinks=sinks))
    waiting = deque(range(len(prompts)))
    first = [waiting.popleft() for _ in range(min(batch_size or len(prompts), len(waiting)))]
    if not first or max_new_tokens < 1:
        return
    running, chosen = passes.enter(first, max(text.limit for text in texts))
    while True:
        ended = (yield list(zip(running.rows, chosen, strict=True))) or set()
        free = passes.over(running, ended)
        while free and waiting:
            places = free[: len(waiting)]
            rows = [waiting.popleft() for _ in places]
            entering, chosen = passes.enter(rows, max(len(texts[row].ids) for row in rows))
            ended = (yield list(zip(rows, chosen, strict=True))) or set()
            running.replace(places, entering)
            free = sorted(set(free) - set(places) | set(passes.over(running, ended)))
        if free:
            keep = [i for i in range(len(running.rows)) if i not in free]
            if not keep:
                return
            running.select(keep)
        chosen = passes.step(running)


@dataclass(frozen=True)
class _Passes:
    """How rows begin and go on, whichever share a batch: all that `decode` was told but their order."""

    model: Decoder
    texts: Sequence[Request]
    sampling: Sampling
    seeds: Sequence[int]
    use_state: bool
    cache_dtype: torch.dtype | None
    seen: Mask

    def enter(self, rows: list[int], slots: int) -> tuple[RunningBatch, list[int]]:
        """A batch of rows that have not been read, whose texts take so many slots, and their first tokens."""
        config = self.model.config
        slots = cache_slots(config, slots, self.seen.window or 0, self.seen.sinks)
        state = self.model.state(len(rows), slots, self.cache_dtype) if self.use_state else None
        ids, seeds = [self.texts[i].ids for i in rows], [self.seeds[i] for i in rows]
        entering = RunningBatch(rows, state, Sampler(self.sampling, ids, config.vocab_size, seeds))
        return entering, self.step(entering)

    def step(self, batch: RunningBatch) -> list[int]:
        """Read what is unread of each text, choose a token a text and append it."""
        texts = [self.texts[row] for row in batch.rows]
        with evaluating(self.model):
            if batch.state is None:
                logits = _read(self.model, texts, [0] * len(texts), [text.ids for text in texts], None, self.seen)
            else:
                logits = _read_on(self.model, texts, batch.state, self.seen)
            chosen: list[int] = batch.sampler(logits).tolist()
        for text, token in zip(texts, chosen, strict=True):
            text.read = len(text.ids)
            text.append(token)
        return chosen

    def over(self, batch: RunningBatch, ended: set[int]) -> list[int]:
        """The places in a batch of rows that were ended or are full."""
        return [i for i, row in enumerate(batch.rows) if row in ended or self.texts[row].is_full]


def _read_on(model: Decoder, texts: Sequence[Request], state: State, seen: Mask) -> Tensor:
    """Logits (B, V) behind each text, the unread of which is taken in by pieces for which there is room."""
    unread = [text.ids[text.read :] for text in texts]
    counts = [len(ids) for ids in unread]
    size = max(counts)
    if seen.window is not None and max(state.lengths) + size > state.max_len:
        size = min(size, state.max_len - seen.sinks - seen.window + 1)
    logits = None
    for start in range(0, max(counts), size):
        since = [text.read + start for text in texts]
        piece = [ids[start : start + size] for ids in unread]
        if seen.window is not None:
            state.make_room(max(map(len, piece)), seen.window, seen.sinks)
        found = _read(model, texts, since, piece, state, seen)
        if logits is not None:  # a text that ended in an earlier piece has its own
            reached = torch.tensor([count > start for count in counts], device=found.device)
            found = torch.where(reached[:, None], found, logits)
        logits = found
    assert logits is not None
    return logits


def _read(
    model: Decoder,
    texts: Sequence[Request],
    since: Sequence[int],
    unread: Sequence[Sequence[int]],
    state: State | None,
    seen: Mask,
) -> Tensor:
    """Logits (B, V) behind `unread`, some tokens of each text from `since` on; of no use for a text of none."""
    counts = [len(ids) for ids in unread]
    positions = prefix = None
    if texts[0].places:
        places = [text.places[start : start + n] for text, start, n in zip(texts, since, counts, strict=True)]
        positions = _padded(places).mT.to(model.device)
        if state is None or not texts[0].read or seen.window is not None:  # else one more token sees all there is
            prefix = torch.tensor([text.layout.prefix for text in texts if text.layout is not None])
    elif model.step is not None and state is not None and min(counts):
        logits = model.step(unread, state, seen)
        if logits is not None:
            return logits
    lengths = torch.tensor(counts) if min(counts) < max(counts) else None
    mask = replace(seen, lengths=lengths, prefix=prefix)
    hidden = model.hidden(_padded(unread).to(model.device), positions, mask, state)
    return model.head(hidden[:, -1] if lengths is None else hidden[torch.arange(len(texts)), lengths - 1])


def _padded(rows: Sequence[Sequence[Any]]) -> Tensor:
    """Rows of unequal length as one tensor with zeros on the right, (B, T) or for pairs (B, T, 2)."""
    if len({len(row) for row in rows}) == 1:
        return torch.tensor(rows)
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
