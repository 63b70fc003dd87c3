"""Continuous batching: requests come and leave at any time and share every pass (Orca, Yu et al. 2022)."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minillama.config.cost import cache_slots
from minillama.inference.request import GREEDY, Request, Row
from minillama.inference.sampling import Sampling, choose
from minillama.layers.cache import State
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.tokenizer.blanks import Layout

Steps = Generator[list[tuple[int, int]], set[int] | None, None]
CHUNK = 512  # prompt tokens per pass while other requests wait for their next token


class Decoding(Protocol):
    """Token source with the yields and sends of `decode`, such as `speculative.Speculation`."""

    def __call__(
        self, model: Decoder, prompts: Sequence[Sequence[int] | Layout], max_new_tokens: int, sampling: Sampling
    ) -> Steps:
        """The steps of these prompts."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before is restored."""
    training = model.training
    if training:  # setting the mode of all modules takes longer than a token of a small model
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


@dataclass
class _Batch:
    """Rows and their decode state, None where each pass reads everything again."""

    rows: list[Row]
    state: State | None
    logits: Tensor | None = None  # behind the rows whose prompt has been read, while others' are

    def select(self, indices: Sequence[int]) -> None:
        """Keep these rows, in this order; a repeated row is copied."""
        self.rows = [self.rows[i] for i in indices]
        if self.state is not None:
            self.state.select(indices)


class Engine:
    """Scheduler of requests over a model. Each pass serves all that run; a waiting one enters where there is room.

    A prompt is read in a pass of its own, or in several of `chunk` tokens while others run, between which these get
    their next tokens; from its first token on a request shares the batch. Samples of one prompt read it once. The
    tokens of a request do not depend on the others, but for rounding.

    Args:
        model: the decoder.
        max_rows: requests that run at once.
        chunk: prompt tokens per pass while others run; infilling prompts, which attend to all of themselves, are read
            whole.
        use_state: keep keys and values between passes. Without, each pass reads everything again; the tokens are the
            same, and a test holds the two against each other.
        cache_dtype: of keys and values: the model's type unless given, a lower-precision float, or int8.
        window: sliding window: a token attends to the last `window` tokens; all unless given.
        sinks: attention sinks: the first `sinks` tokens stay visible (Xiao et al. 2023, arXiv 2309.17453).
    """

    def __init__(
        self,
        model: Decoder,
        max_rows: int = 16,
        chunk: int = CHUNK,
        use_state: bool = True,
        cache_dtype: torch.dtype | None = None,
        window: int | None = None,
        sinks: int = 0,
    ) -> None:
        self.model, self.max_rows, self.chunk = model, max_rows, chunk
        self.use_state, self.cache_dtype = use_state, cache_dtype
        self.mask = Mask(window=window, sinks=sinks)
        self.waiting: deque[Row] = deque()
        self.entering: _Batch | None = None
        self.sharing: list[list[Row]] = []  # by row of `entering`, the requests that read it
        self.running = _Batch([], None)
        self._others_wait = False  # running requests had no pass since others entered
        self._groups = count()
        if max_rows < 1 or chunk < 1:
            raise ValueError(f"max_rows and chunk are 1 or more, not {max_rows} and {chunk}")

    @property
    def is_busy(self) -> bool:
        """Whether a request is unfinished."""
        return any(not row.finished for row in [*self.waiting, *self._entering_rows(), *self.running.rows])

    def _entering_rows(self) -> list[Row]:
        return [row for rows in self.sharing for row in rows] if self.entering else []

    def submit(self, request: Request, samples: int = 1) -> list[Request]:
        """Queue a request; with several samples as many, with seeds from its own on, which read the prompt once.

        Raises:
            ValueError: a prompt without a token, or longer than the model's context.
        """
        context, seed = self.model.config.max_seq_len, request.seed
        size = len(request.prompt.tokens if isinstance(request.prompt, Layout) else request.prompt)
        if not size:
            raise ValueError("a prompt without a token")
        if size > context:
            raise ValueError(f"a prompt of {size} tokens is longer than the model's context of {context}")
        if request.finish_reason is not None or request.tokens:
            raise ValueError("this request was submitted before")
        vocab_size = self.model.config.vocab_size
        ids = request.prompt.tokens if isinstance(request.prompt, Layout) else request.prompt
        if not all(0 <= token < vocab_size for token in ids):
            raise ValueError(f"a prompt with a token id outside 0..{vocab_size - 1}")
        rows = [*self.waiting, *self._entering_rows(), *self.running.rows]
        if rows and (rows[0].layout is None) == isinstance(request.prompt, Layout):
            raise ValueError("infilling prompts do not share a batch with others")
        seed = request.sampling.seed if seed is None else seed
        more = [replace(request, seed=seed + i, tokens=[], log_probabilities=[]) for i in range(1, samples)]
        requests = [request, *more]
        group = next(self._groups)
        for each in requests:
            if each.max_new_tokens < 1:
                each.finish_reason = "length"
                continue
            self.waiting.append(Row(each, context, vocab_size, group))
        return requests

    def cancel(self, request: Request) -> None:
        """End a request; it gets no more tokens, and its place is free."""
        request.finish_reason = request.finish_reason or "cancelled"
        self._release()

    def refresh(self) -> None:
        """After a change of weights: the caches are computed again, and running requests go on from there."""
        step: Any = self.model.step
        if hasattr(step, "refresh"):
            step.refresh()
        for row in reversed([row for row in [*self.running.rows, *self._entering_rows()] if not row.finished]):
            row.read = 0
            self.waiting.appendleft(row)
        self.running, self.entering, self.sharing = _Batch([], None), None, []

    def _release(self) -> None:
        """Free what is kept for requests that have all ended."""
        if all(row.finished for row in self._entering_rows()):
            self.entering, self.sharing = None, []
        if all(row.finished for row in self.running.rows):
            self.running = _Batch([], None)

    def step(self) -> list[Request]:
        """A pass over prompts or a chunk of them, if there are any, and one over the running requests.

        Returns:
            The requests that got a token. If a pass fails, what was read is read again in the next step.
        """
        try:
            return self._step()
        except BaseException:
            self.refresh()
            raise

    def _step(self) -> list[Request]:
        self.waiting = deque(row for row in self.waiting if not row.finished)
        self._admit()
        with evaluating(self.model):
            if self.entering is not None:
                logits = self._prefill(self.entering)
                if logits is not None:
                    self._others_wait = any(not row.finished for row in self.running.rows)
                    return self._join(self.entering, logits)
            self._others_wait = False
            keep = [i for i, row in enumerate(self.running.rows) if not row.finished]
            if not keep:
                return []
            if len(keep) < len(self.running.rows):
                self.running.select(keep)
            logits = self._read_on(self.running)
            assert logits is not None  # it reads all
            return self._take(self.running.rows, logits)

    def _admit(self) -> None:
        """Start to read the prompts that wait and for which there is room."""
        if self.entering is not None or not self.waiting or self._others_wait:
            return
        room = self.max_rows - sum(not row.finished for row in self.running.rows)
        rows = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        if not rows:
            return
        sharing: dict[tuple[int, tuple[int, ...]], list[Row]] = {}
        for row in rows:
            sharing.setdefault((row.group, tuple(row.ids)), []).append(row)
        self.sharing = list(sharing.values())
        unique = [same[0] for same in self.sharing]
        # the state of the first ones serves all that wait; what enters later is copied into it
        later = any(not row.finished for row in self.running.rows)
        slots = max(len(row.ids) for row in rows) if later else max(row.limit for row in (*rows, *self.waiting))
        self.entering = _Batch(unique, self._state(len(unique), slots))

    def _state(self, rows: int, slots: int) -> State | None:
        if not self.use_state:
            return None
        slots = cache_slots(self.model.config, slots, self.mask.window or 0, self.mask.sinks)
        return self.model.state(rows, slots, self.cache_dtype)

    def _prefill(self, batch: _Batch) -> Tensor | None:
        """Read the prompts, or a chunk of them if others run; the logits (B, V) behind them when all has been read."""
        others = any(not row.finished for row in self.running.rows) and batch.rows[0].layout is None
        size = max(1, self.chunk // len(batch.rows)) if others and batch.state is not None else None
        return self._read_on(batch, size)

    def _join(self, entering: _Batch, logits: Tensor) -> list[Request]:
        """Sample the first tokens, and put the rows into the running batch."""
        pairs = [(i, row) for i, rows in enumerate(self.sharing) for row in rows if not row.finished]
        self.entering, self.sharing = None, []
        indices = [i for i, _ in pairs]
        if indices != list(range(len(entering.rows))):
            entering.select(indices)
            logits = logits[indices]
        entering.rows = [row for _, row in pairs]
        self._place(entering)
        return self._take(entering.rows, logits)

    def _place(self, entering: _Batch) -> None:
        """Into the places of finished rows, and more behind them where there are too few."""
        running, new = self.running, entering.rows
        keep = [row for row in running.rows if not row.finished]
        if running.state is None or entering.state is None or not keep:
            self.running = _Batch([*keep, *new], self._grown(entering.state, [*keep, *new]))
            return
        running.state = self._grown(running.state, [*keep, *new])
        free = [i for i, row in enumerate(running.rows) if row.finished]
        missing = len(new) - len(free)
        if missing > 0:  # copies of any row, which are overwritten
            size = len(running.rows)
            running.select([*range(size), *[0] * missing])
            free += range(size, size + missing)
        running.state.replace(free[: len(new)], entering.state)
        for place, row in zip(free, new, strict=False):
            running.rows[place] = row

    def _grown(self, state: State | None, rows: Sequence[Row]) -> Any:
        """The state, or one of more slots with the same rows, large enough for these rows' maximum length."""
        limit = max(row.limit for row in rows)
        if state is None or state.max_len >= cache_slots(
            self.model.config, limit, self.mask.window or 0, self.mask.sinks
        ):
            return state
        grown = self._state(len(state.lengths), limit)
        assert grown is not None
        grown.replace(range(len(state.lengths)), state)
        return grown

    def _take(self, rows: Sequence[Row], logits: Tensor) -> list[Request]:
        """Choose a token per row, and append it."""
        tokens = choose(logits, [row.sampler for row in rows]).tolist()
        wanted = [i for i, row in enumerate(rows) if row.request.logprobs]
        found: dict[int, float] = {}
        if wanted:
            ids = torch.tensor([tokens[i] for i in wanted], device=logits.device)[:, None]
            chosen = logits[wanted].float().log_softmax(-1).gather(-1, ids)[:, 0].tolist()
            found = dict(zip(wanted, chosen, strict=True))
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            row.append(token, found.get(i))
        for row in rows:  # after all have theirs: a condition of the caller's may fail
            row.end_if_done()
        self._release()
        return [row.request for row in rows]

    def _read_on(self, batch: _Batch, size: int | None = None) -> Tensor | None:
        """Read what is unread, by pieces for which there is room; logits (B, V) behind each row.

        Args:
            batch: its rows' `read` is brought forward by `size` alone; else `append` does that.
            size: tokens per row to read at most; None where that leaves some unread.
        """
        rows, state = batch.rows, batch.state
        if state is None:
            return self._read(rows, [0] * len(rows), [row.ids for row in rows], None)
        counts = [len(row.ids) - row.read for row in rows]
        piece = max(counts) if size is None else min(size, max(counts))
        if self.mask.window is not None and max(state.lengths) + piece > state.max_len:
            piece = min(piece, state.max_len - self.mask.sinks - self.mask.window + 1)
        for start in range(0, max(counts) if size is None else piece, piece):
            since = [row.read + start for row in rows]
            unread = [row.ids[begin : begin + piece] for row, begin in zip(rows, since, strict=True)]
            if self.mask.window is not None:
                state.make_room(max(map(len, unread)), self.mask.window, self.mask.sinks)
            logits = self._read(rows, since, unread, state)
            if batch.logits is not None:  # a prompt that ended in an earlier piece has its own
                reached = torch.tensor([length > start for length in counts], device=logits.device)
                logits = torch.where(reached[:, None], logits, batch.logits)
            batch.logits = logits
        if size is not None:
            for row in rows:
                row.read = min(row.read + piece, len(row.ids))
            if any(row.read < len(row.ids) for row in rows):
                return None
        found, batch.logits = batch.logits, None
        return found

    def _read(
        self, rows: Sequence[Row], since: Sequence[int], unread: Sequence[Sequence[int]], state: State | None
    ) -> Tensor:
        """Logits (B, V) behind `unread`, some tokens of each row from `since` on; of no use for a row of none."""
        model = self.model
        counts = [len(ids) for ids in unread]
        positions = prefix = None
        if rows[0].places:
            places = [row.places[start : start + n] for row, start, n in zip(rows, since, counts, strict=True)]
            positions = _padded(places).mT.to(model.device)
            if (
                state is None or not rows[0].read or self.mask.window is not None
            ):  # else one more token sees all there is
                prefix = torch.tensor([row.layout.prefix for row in rows if row.layout is not None])
        elif model.step is not None and state is not None and min(counts):
            logits = model.step(unread, state, self.mask)
            if logits is not None:
                return logits
        lengths = torch.tensor(counts) if min(counts) < max(counts) else None
        mask = replace(self.mask, lengths=lengths, prefix=prefix)
        hidden = model.hidden(_padded(unread).to(model.device), positions, mask, state)
        return model.head(hidden[:, -1] if lengths is None else hidden[torch.arange(len(rows)), lengths - 1])


def _padded(rows: Sequence[Sequence[Any]]) -> Tensor:
    """Rows of unequal length as one tensor with zeros on the right, (B, T) or for pairs (B, T, 2)."""
    if len({len(row) for row in rows}) == 1:
        return torch.tensor(rows)
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)


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
    """Token steps of several prompts: yields (row, token) for rows that are still going, by an `Engine`.

    Send a set of rows into the generator to end them. A prompt that waits takes the place of a row that has ended.

    Args:
        model: the decoder.
        prompts: token ids, one sequence per row, each at least one token long; or for all rows infilling layouts.
        max_new_tokens: tokens per row at most. A row also ends when the model's context is full.
        sampling: how tokens are chosen.
        use_state: see `Engine`.
        seeds: of each row's random choices; `sampling.seed` + i for row i unless given.
        batch_size: rows at once; all unless given.
        cache_dtype: see `Engine`.
        window: see `Engine`.
        sinks: see `Engine`.

    Raises:
        ValueError: a prompt longer than the context.
    """
    chunk = model.config.max_seq_len * max(1, len(prompts))  # whole prompts: nobody else waits for these rows
    engine = Engine(model, batch_size or max(1, len(prompts)), chunk, use_state, cache_dtype, window, sinks)
    seeds = seeds or [sampling.seed + row for row in range(len(prompts))]
    rows: dict[int, int] = {}
    requests = []
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        requests += engine.submit(Request(prompt, max_new_tokens, sampling, seed))
        rows[id(requests[row])] = row
    while engine.is_busy:
        moved = engine.step()
        if moved:
            ended = (yield [(rows[id(request)], request.tokens[-1]) for request in moved]) or ()
            for row in ended:
                engine.cancel(requests[row])
