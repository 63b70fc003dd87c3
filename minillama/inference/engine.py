"""Continuous batching: requests come and leave at any time and share every pass (Orca, Yu et al. 2022)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minillama.config.cost import cache_slots
from minillama.inference.request import Batch, Request, Row, check_ids
from minillama.inference.sampling import choose
from minillama.inference.speculative import Speculation
from minillama.layers.cache import State
from minillama.layers.cross_entropy import log_probabilities
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.tokenizer.blanks import Layout

CHUNK = 512  # prompt tokens per pass while other requests wait for their next token
SHARED = 32  # tokens that prompts begin with alike, from which on these are read once


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


class Engine:
    """Scheduler of requests over a model. Each pass serves all that run; a waiting one enters where there is room.

    A prompt is read in a pass of its own, or in several of `chunk` tokens while others run, between which these get
    their next tokens; from its first token on a request shares the batch. Samples of one prompt read it once, and
    where prompts are read whole, so is what all that wait begin with. The tokens of a request do not depend on the
    others, but for rounding.

    Args:
        model: the decoder.
        max_rows: requests that run at once.
        chunk: prompt tokens per pass while others run; infilling prompts, which attend to all of themselves, are read
            whole. None: all prompts are.
        cache_dtype: of keys and values: the model's type unless given, a lower-precision float, or int8.
        window: sliding window: a token attends to the last `window` tokens; all unless given.
        sinks: attention sinks: the first `sinks` tokens stay visible (Xiao et al. 2023, arXiv 2309.17453).
        speculation: speculative decoding, by a draft model or prompt lookup.

    Raises:
        InputError: a model or draft model that does not support speculative decoding.
    """

    def __init__(
        self,
        model: Decoder,
        max_rows: int = 16,
        chunk: int | None = CHUNK,
        cache_dtype: torch.dtype | None = None,
        window: int | None = None,
        sinks: int = 0,
        speculation: Speculation | None = None,
    ) -> None:
        self.model, self.max_rows, self.chunk = model, max_rows, chunk
        self.cache_dtype, self.speculation = cache_dtype, speculation
        self.mask = Mask(window=window, sinks=sinks)
        if speculation is None:
            self.mask = self.mask.within(model.config.sliding_window)  # so that the cache holds no more
        self.waiting: deque[Row] = deque()
        self.entering: Batch | None = None  # while one of its requests has not ended, as `running`
        self.running: Batch | None = None
        self.beginning: tuple[list[int], State | None] | None = None  # of the prompts that wait, see `_common`
        self.steps = False  # whether `model.step` may be used
        self._others_wait = False  # running requests had no pass since others entered
        if max_rows < 1 or (chunk is not None and chunk < 1):
            raise ValueError(f"max_rows and chunk are 1 or more, not {max_rows} and {chunk}")
        if speculation is not None:
            speculation.check(model)
            if window is not None:
                raise ValueError("speculative decoding needs the keys and values of all tokens, not of a window")

    @property
    def is_busy(self) -> bool:
        """Whether a request is unfinished."""
        return next(self._unfinished(), None) is not None

    def _unfinished(self) -> Iterator[Row]:
        """All rows of requests that have not ended, the running ones first."""
        batches = (batch.unfinished() for batch in (self.running, self.entering) if batch is not None)
        return chain(chain.from_iterable(batches), (row for row in self.waiting if not row.finished))

    def submit(self, request: Request, samples: int = 1) -> list[Request]:
        """Queue a request; with several samples as many, with seeds from its own on, which read the prompt once.

        Raises:
            ValueError: a prompt without a token, or longer than the model's context.
        """
        context, vocab_size = self.model.config.max_seq_len, self.model.config.vocab_size
        if not len(request.ids):
            raise ValueError("a prompt without a token")
        if len(request.ids) > context:
            raise ValueError(f"a prompt of {len(request.ids)} tokens is longer than the model's context of {context}")
        if request.finish_reason is not None or request.tokens:
            raise ValueError("this request was submitted before")
        check_ids(request.ids, vocab_size)
        infills = isinstance(request.prompt, Layout)
        if infills and self.speculation is not None:
            raise ValueError("infilling prompts are decoded without speculation")
        if any((row.layout is not None) != infills for row in islice(self._unfinished(), 1)):
            raise ValueError("infilling prompts do not share a batch with others")
        self.beginning, seed = None, request.sampling.seed if request.seed is None else request.seed
        more = [replace(request, seed=seed + i, tokens=[], log_probabilities=[]) for i in range(1, samples)]
        for each in (request, *more):
            if each.max_new_tokens < 1:
                each.finish_reason = "length"
            else:
                self.waiting.append(Row(each, context, vocab_size, request))
        return [request, *more]

    def run(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Submit requests, and step until they have ended."""
        for request in requests:
            self.submit(request)
        while any(request.finish_reason is None for request in requests):
            self.step()
        return requests

    def cancel(self, request: Request) -> None:
        """End a request; it gets no more tokens, and its row is free."""
        request.finish_reason = request.finish_reason or "cancelled"
        self._release()

    def refresh(self) -> None:
        """After a change of weights: the caches are computed again, and running requests go on from there."""
        step: Any = self.model.step
        if hasattr(step, "refresh"):
            step.refresh()
        if self.speculation is not None:
            self.speculation.drafters.clear()
        self.waiting = deque(self._unfinished())
        for row in self.waiting:
            row.read = 0
        self.running = self.entering = self.beginning = None

    def _release(self) -> None:
        """Free what is kept for requests that have all ended."""
        if self.entering is not None and not self.entering.unfinished():
            self.entering = None
        if self.running is not None and not self.running.unfinished():
            self.running = None
        self.beginning = self.beginning if self.is_busy else None  # weights and adapters may change

    def step(self) -> list[Request]:
        """A pass over prompts or a chunk of them, if there are any, and one over the running requests.

        Returns:
            The requests that got a token, with speculation several. If a pass fails, what was read is read again in
            the next step.
        """
        draft = self.speculation.draft if self.speculation is not None else None
        try:
            with evaluating(self.model), evaluating(draft or self.model):
                return self._step()
        except BaseException:
            self.refresh()
            raise

    def _step(self) -> list[Request]:
        self._admit()
        entering = self.entering
        if entering is not None and self._prefill(entering):
            self._others_wait = self.running is not None and self.speculation is None
            self._join(entering)
            if self.speculation is None:
                return self._take(entering)
        self._others_wait = False
        running = self.running
        if running is None:
            return []
        running.select([i for i, row in enumerate(running.rows) if not row.finished])
        if self.speculation is not None:
            return self._verify(running, self.speculation)
        self._read_on(running)
        return self._take(running)

    def _admit(self) -> None:
        """Start to read the prompts that wait and for which there is room."""
        self.waiting = deque(row for row in self.waiting if not row.finished)
        running = self.running.unfinished() if self.running is not None else []
        room = self.max_rows - len(running)
        if self.entering is not None or not self.waiting or self._others_wait or room < 1:
            return
        is_long = self._is_long([*running, *self.waiting][0])
        alike = [row for row in self.waiting if self._is_long(row) == is_long]
        rows = alike[:room]
        if not rows:  # they enter when the running ones have ended
            return
        # hooks and kernels set by hand turn the faster step off
        self.steps = self.model.step is not None and not getattr(self.model.step, "unsupported", lambda: None)()
        samples: dict[tuple[Request, tuple[int, ...]], list[Row]] = {}
        for row in rows:
            samples.setdefault((row.first, tuple(row.ids)), []).append(row)
        # the state of the first ones serves all that wait; what enters later is copied into it
        later = self.running is not None
        tokens = max(len(row.ids) if later else row.limit for row in (rows if later else alike))
        firsts, slots = [same[0] for same in samples.values()], self._slots(tokens)
        state = self._begun(firsts, alike, slots) or self._state(len(samples), slots, rows)
        self.entering, entering = Batch(firsts, state, [*samples.values()]), set(rows)
        self.waiting = deque(row for row in self.waiting if row not in entering)

    def _begun(self, rows: Sequence[Row], alike: Sequence[Row], slots: int) -> State | None:
        """State of rows behind what all prompts that wait begin with; None where that is short, or chunks are read."""
        if self.chunk or self.speculation or self.mask.window is not None or rows[0].layout is not None:
            return None
        if self.beginning is None:
            self.beginning = self._common(alike)
        ids, one = self.beginning
        if one is None or self._is_long(rows[0]) != (one.length > self.model.config.short_context):
            return None
        if any(row.limit > one.length or row.ids[:-1][: len(ids)] != ids for row in rows):
            return None
        state = one.fork([0] * len(rows), slots - len(ids))
        for row in rows:
            row.read = len(ids)
        return state

    def _common(self, rows: Sequence[Row]) -> tuple[list[int], State | None]:
        """What the prompts of these rows begin with, and the state behind it; none where it would not pay."""
        columns = zip(*(islice(row.ids, len(row.ids) - 1) for row in rows), strict=False)
        ids = [same[0] for same in takewhile(lambda ids: len({*ids}) == 1, columns)]
        if len(ids) < SHARED or len({row.first for row in rows}) == 1:
            return [], None
        state = self._state(1, len(ids), rows)
        self._read(Batch([*rows[:1]], state), [ids])
        return ids, state

    def _is_long(self, row: Row) -> bool:
        """Whether a row may get longer than sequences with the same rotary frequencies; the two share no pass."""
        return row.limit > self.model.config.short_context

    def _state(self, count: int, slots: int, rows: Sequence[Row]) -> State:
        state = self.model.state(count, slots, self.cache_dtype)
        state.length = max(row.limit for row in rows)
        return state

    def _slots(self, tokens: int) -> int:
        padding = self.speculation.draft_tokens if self.speculation is not None else 0  # drafts differ in length
        return cache_slots(self.model.config, tokens, self.mask.window or 0, self.mask.sinks) + padding

    def _prefill(self, batch: Batch) -> bool:
        """Read the prompts, or a chunk of them if others run; whether all has been read.

        With speculation the last token is left: it is read with the first draft.
        """
        size = None
        if self.chunk is not None and self.running is not None and batch.rows[0].layout is None:
            size = max(1, self.chunk // len(batch.rows))
        return self._read_on(batch, size, leave=0 if self.speculation is None else 1)

    def _join(self, entering: Batch) -> None:
        """Put the rows of prompts that have been read into the running batch, one per request."""
        pairs = [(i, row) for i, same in enumerate(entering.samples) for row in same if not row.finished]
        for i, row in pairs:
            row.read = entering.rows[i].read
        entering.select([i for i, _ in pairs])
        entering.rows, entering.samples, self.entering = [row for _, row in pairs], (), None
        if self.running is None:
            self.running = Batch(entering.rows, self._grown(entering.state, entering.rows))
        else:
            self._merge(self.running, entering)

    def _merge(self, running: Batch, entering: Batch) -> None:
        """Rows into the running batch: over finished ones, and behind the others where these are too few."""
        running.state = self._grown(running.state, [*running.unfinished(), *entering.rows])
        free = [i for i, row in enumerate(running.rows) if row.finished]
        size, missing = len(running.rows), len(entering.rows) - len(free)
        if missing > 0:  # copies of any row, which are overwritten
            running.select([*range(size), *[0] * missing])
            free += range(size, size + missing)
        running.state.replace(free[: len(entering.rows)], entering.state)
        for i, row in zip(free, entering.rows, strict=False):
            running.rows[i] = row

    def _grown(self, state: State, rows: Sequence[Row]) -> State:
        """The state, or one of more slots with the same tokens, large enough for these rows' maximum length."""
        slots = self._slots(max(row.limit for row in rows))
        if state.max_len >= slots:
            return state
        grown = self._state(len(state.lengths), slots, rows)
        grown.replace(range(len(state.lengths)), state)
        return grown

    def _take(self, batch: Batch) -> list[Request]:
        """Choose a token per row from its logits, and append it."""
        rows, logits, batch.logits = batch.rows, batch.logits, None
        assert logits is not None
        tokens = choose(logits, [row.sampler for row in rows])
        found: dict[int, float] = {}
        wanted = [i for i, row in enumerate(rows) if row.request.logprobs]
        if wanted:
            ids = torch.tensor([tokens[i] for i in wanted], device=logits.device)
            chosen = log_probabilities(logits[wanted], ids)
            found = dict(zip(wanted, chosen.tolist(), strict=True))
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            row.append(token, found.get(i))
        for row in rows:  # after all have theirs: a condition of the caller's may fail
            row.end_if_done()
        self._release()
        return [row.request for row in rows]

    def _verify(self, batch: Batch, speculation: Speculation) -> list[Request]:
        """Draft some tokens per row, read them in one pass, and append those that are accepted and the next."""
        drafts = [speculation.propose(row, self.model.config.vocab_size, self.cache_dtype) for row in batch.rows]
        unread = [row.ids[row.read :] + draft.tokens for row, draft in zip(batch.rows, drafts, strict=True)]
        sizes = [len(draft.tokens) + 1 for draft in drafts]
        for row, draft, logits in zip(batch.rows, drafts, self._read(batch, unread, sizes).split(sizes), strict=True):
            speculation.verify(row, draft, logits)
        batch.state.truncate([row.read for row in batch.rows])
        self._release()
        return [row.request for row in batch.rows]

    def _read_on(self, batch: Batch, size: int | None = None, leave: int = 0) -> bool:
        """Read what is unread but the last `leave` tokens, at most `size` per row, in chunks for which there is room.

        `batch.logits` are those behind it. Returns whether nothing is left.
        """
        rows, state, window, sinks = batch.rows, batch.state, self.mask.window, self.mask.sinks
        while any(row.read < len(row.ids) - leave for row in rows):
            unread = [row.ids[row.read : len(row.ids) - leave] for row in rows]
            count = max(map(len, unread)) if size is None else min(size, max(map(len, unread)))
            if window is not None:
                if max(state.lengths) + count > state.max_len:
                    count = min(count, state.max_len - sinks - window + 1)
                state.make_room(count, window, sinks)
            unread = [ids[:count] for ids in unread]
            logits = self._read(batch, unread)
            if batch.logits is not None:  # a prompt that ended in an earlier chunk has its own
                reached = torch.tensor([len(ids) > 0 for ids in unread], device=logits.device)
                logits = torch.where(reached[:, None], logits, batch.logits)
            batch.logits = logits
            for row, ids in zip(rows, unread, strict=True):
                row.read += len(ids)
            if size is not None:
                break
        return all(row.read == len(row.ids) - leave for row in rows)

    def _read(self, batch: Batch, unread: Sequence[Sequence[int]], last: Sequence[int] | None = None) -> Tensor:
        """Forward pass over some unread tokens of each row.

        Args:
            batch: rows and state, which takes the tokens in.
            unread: the next tokens of each row.
            last: tokens of each row whose logits are wanted, the last ones; one unless given.

        Returns:
            Logits (sum of `last`, V), or (B, V); of no use for a row of none.
        """
        model, rows, state, counts = self.model, batch.rows, batch.state, [len(ids) for ids in unread]
        positions = prefix = None
        if rows[0].layout is not None:
            spans = [row.positions[row.read : row.read + n] for row, n in zip(rows, counts, strict=True)]
            positions = _padded(spans).mT.to(model.device)
            # one more token attends to all there is
            if not rows[0].read or self.mask.window is not None:
                prefix = torch.tensor([row.layout.prefix for row in rows if row.layout is not None])
        elif self.steps and model.step is not None and last is None:
            logits = model.step(unread, state, self.mask)
            if logits is not None:
                return logits
        lengths = torch.tensor(counts) if min(counts) < max(counts) else None
        mask = replace(self.mask, lengths=lengths, prefix=prefix)
        hidden = model.hidden(_padded(unread).to(model.device), positions=positions, mask=mask, state=state)
        if last is not None:
            ends = zip(hidden, counts, last, strict=True)
            return model.head(torch.cat([row[end - size : end] for row, end, size in ends]))
        return model.head(hidden[:, -1] if lengths is None else hidden[torch.arange(len(rows)), lengths - 1])


def _padded(rows: Sequence[Sequence[Any]]) -> Tensor:
    """Rows of unequal length as one tensor with zeros on the right, (B, T) or for pairs (B, T, 2)."""
    if len({len(row) for row in rows}) == 1:
        return torch.tensor(rows)
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
