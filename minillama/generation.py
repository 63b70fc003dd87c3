"""The decode loop: prompts of unequal length in one batch, stop strings, streaming.

`decode` works on token ids; `generate` and `stream` put text around it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from minillama.blanks import Blanks, Layout
from minillama.errors import InputError
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.sampling import Sampler, Sampling
from minillama.tokenizer import Tokenizer

__all__ = ["GREEDY", "Completion", "Piece", "Reason", "blanks_of", "decode", "evaluating", "generate", "stream"]

Reason = Literal["eos", "stop", "length", "context"]
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Piece:
    """One step of one row: new text, and why the row ended, if it did.

    `reason` is `eos` (the model wrote the end-of-text token), `stop` (a stop string), `length`
    (max_new_tokens) or `context` (the model's context is full).
    """

    row: int
    text: str
    reason: Reason | None = None


@dataclass(frozen=True)
class Completion:
    """The whole continuation of one prompt."""

    text: str
    tokens: tuple[int, ...]
    reason: Reason


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients, and as before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def decode(
    model: Decoder,
    prompts: Sequence[Sequence[int] | Layout],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    use_state: bool = True,
    seeds: Sequence[int] | None = None,
) -> Generator[list[tuple[int, int]], set[int] | None, None]:
    """Yield, step by step, (row, token) for every row that is still going.

    Send a set of rows into the generator to end them; they are dropped from the batch.

    Args:
        model: the decoder.
        prompts: token ids, one sequence a row, each at least one token long; or for all rows texts with
            blanks, of which the last is filled.
        max_new_tokens: steps at most. A row also ends when the model's context is full.
        sampling: how tokens are chosen.
        use_state: keep keys and values between steps. Without, each step reads everything again; the
            tokens are the same, and a test holds the two against each other.
        seeds: of each row's random choices; `sampling.seed` + i for row i unless given.
    """
    context = model.config.max_seq_len
    layouts = [prompt for prompt in prompts if isinstance(prompt, Layout)]
    texts = [list(prompt.tokens if isinstance(prompt, Layout) else prompt) for prompt in prompts]
    rows = list(range(len(texts)))
    sampler = Sampler(sampling, texts, model.config.vocab_size, seeds)
    state = model.state(len(rows), min(context, max(map(len, texts)) + max_new_tokens)) if use_state else None
    places = [list(layout.places) for layout in layouts]
    unread, where = texts, places
    for _ in range(max_new_tokens):
        with evaluating(model):
            counts = torch.tensor([len(ids) for ids in unread])
            tokens = _padded(unread).to(model.device)
            positions = _padded(where).mT.to(model.device) if where else None
            is_ragged = int(counts.min()) < int(counts.max())
            prefix = None
            if where and (unread is texts or not use_state):  # one more token sees all that is there anyway
                prefix = torch.tensor([layouts[row].prefix for row in rows])
            mask = Mask(lengths=counts if is_ragged else None, prefix=prefix)
            hidden = model.hidden(tokens, positions, mask, state)
            last = hidden[torch.arange(len(rows)), counts - 1]
            chosen = sampler(model.head(last)).tolist()
        ended = (yield list(zip(rows, chosen, strict=True))) or set()
        for row, token in zip(rows, chosen, strict=True):
            texts[row].append(token)
            if places:
                place, within = places[row][-1]
                places[row].append((place, within + 1))
        keep = [i for i, row in enumerate(rows) if row not in ended and len(texts[row]) < context]
        if len(keep) < len(rows):
            rows = [rows[i] for i in keep]
            sampler.select(keep)
            if state is not None and rows:
                state.select(keep)
        if not rows:
            return
        new = slice(-1, None) if use_state else slice(None)
        unread = [texts[row][new] for row in rows]
        where = [places[row][new] for row in rows] if places else []


def _padded(rows: Sequence[Sequence[Any]]) -> torch.Tensor:
    """Rows of unequal length as one tensor with zeros on the right, (B, T) or for pairs (B, T, 2)."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


class StopText:
    """Holds back text that may be the beginning of a stop string, so that no part of one leaks.

    Args:
        stops: the strings, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """New text in; text that is safe to show out, and whether a stop string was met.

        What precedes the earliest stop string is shown, what follows it is not.
        """
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            shown, self.held = self.held[: min(found)], ""
            return shown, True
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def blanks_of(model: Decoder, tokenizer: Tokenizer) -> Blanks | None:
    """The marks by which a model that fills blanks continues a text; None for one that reads from left to right.

    Raises:
        InputError: the tokenizer is not the model's.
    """
    check_vocabulary(model, tokenizer)
    return Blanks.of(tokenizer) if model.config.objective == "glm" else None


def check_vocabulary(model: Decoder, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose ids the model does not have."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            "the tokenizer is larger than the model's vocabulary",
            found=f"{tokenizer.vocab_size} tokens",
            expected=f"at most {model.config.vocab_size}",
            fix="give the tokenizer that the model was trained with",
        )


def _encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    encoded = [tokenizer.encode(prompt, bos=tokenizer.add_bos) for prompt in prompts]
    for i, ids in enumerate(encoded):
        if not ids:
            if tokenizer.bos_id is None:
                raise InputError("an empty prompt", where=f"prompt {i + 1}", fix="give at least one character")
            ids.append(tokenizer.bos_id)
    return encoded


def check_room(lengths: Sequence[int], context: int, name: str) -> None:
    """Refuse what fills the context; `name` is what it is called, a prompt or a text."""
    for i, length in enumerate(lengths):
        if length >= context:
            raise InputError(
                f"the {name} fills the model's context and leaves no room for an answer",
                where=f"{name} {i + 1}",
                found=f"{length} tokens",
                expected=f"fewer than {context}",
                fix=f"shorten the {name}",
            )


def pieces(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    use_state: bool = True,
) -> Iterator[tuple[Piece, int]]:
    """Continue prompts together; yield (piece, token id) as text becomes certain.

    Args:
        model: the decoder.
        tokenizer: its tokenizer.
        prompts: texts of any length.
        max_new_tokens: tokens a prompt at most.
        sampling: how tokens are chosen; `Sampling()` unless given.
        stop: strings that end a row; they are not part of the text.
        ignore_eos: go on after the end-of-text token.
        use_state: see `decode`.

    Raises:
        InputError: a prompt that does not fit the context, an empty stop string, a foreign tokenizer.
    """
    if "" in stop:
        raise InputError("an empty stop string", where="stop", fix="leave it out")
    blanks = blanks_of(model, tokenizer)
    texts = _encode(tokenizer, prompts)
    read = [blanks.continuation(ids) for ids in texts] if blanks else texts
    stop_ids = {tokenizer.eos_id, *model.stop_ids} | ({blanks.end} if blanks else set())
    starts = [len(layout.tokens) if isinstance(layout, Layout) else len(layout) for layout in read]
    check_room(starts, model.config.max_seq_len, "prompt")
    lengths = list(starts)
    decoders = [tokenizer.stream(after=ids) for ids in texts]
    filters = [StopText(stop) for _ in texts]
    steps = decode(model, read, max_new_tokens, sampling or Sampling(), use_state)
    ended: set[int] | None = None
    while True:
        try:
            step = steps.send(ended)
        except StopIteration:
            return
        ended = set()
        for row, token in step:
            lengths[row] += 1
            reason: Reason | None = None
            if token in stop_ids and not ignore_eos:
                text, reason = decoders[row].flush(), "eos"
            else:
                text = decoders[row].push(token)
            last_step = lengths[row] - starts[row] >= max_new_tokens
            full = lengths[row] >= model.config.max_seq_len
            if reason is None and (last_step or full):
                text += decoders[row].flush()
                reason = "length" if last_step else "context"
            shown, stopped = filters[row].push(text)
            if stopped:
                reason = "stop"
            elif reason is not None:
                shown += filters[row].flush()
            if reason is not None:
                ended.add(row)
            yield Piece(row, shown, reason), token


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    use_state: bool = True,
) -> list[Completion]:
    """Continue several prompts in one batch. The arguments are those of `pieces`.

    Returns:
        One completion a prompt, in order, without the prompt.
    """
    text = ["" for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    reasons: list[Reason] = ["length" for _ in prompts]
    for piece, token in pieces(model, tokenizer, prompts, max_new_tokens, sampling, stop, ignore_eos, use_state):
        text[piece.row] += piece.text
        tokens[piece.row].append(token)
        reasons[piece.row] = piece.reason or reasons[piece.row]
    return [Completion(t, tuple(ids), r) for t, ids, r in zip(text, tokens, reasons, strict=True)]


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> Iterator[Piece]:
    """Continue one prompt and yield its text piece by piece, never half a character or part of a stop string."""
    for piece, _ in pieces(model, tokenizer, [prompt], max_new_tokens, sampling, stop, ignore_eos):
        if piece.text or piece.reason:
            yield piece
