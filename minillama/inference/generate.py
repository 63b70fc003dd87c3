"""Text generation: prompts in, completions out, stop strings, streaming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from minillama.errors import InputError
from minillama.inference.engine import Decoding, decode
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.blanks import Blanks, Layout

Reason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class Chunk:
    """Streamed chunk: new text of one sequence, and its finish reason, if it ended.

    `reason` is `eos` (the model generated the end-of-text token), `stop` (a stop string), `length`
    (max_new_tokens) or `context` (the model's context is full).
    """

    row: int
    text: str
    reason: Reason | None = None


@dataclass(frozen=True)
class Completion:
    """Completion of one prompt, whole."""

    text: str
    tokens: tuple[int, ...]
    reason: Reason


class StopText:
    """Stop-string filter: holds back text that may begin a stop string, so that no part of one leaks.

    Args:
        stops: the strings, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """New text in; text that is safe to emit out, and whether a stop string was matched.

        Text before the earliest stop string is emitted, text after it is not.
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
        """Text held back, at the end."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def blanks_of(model: Decoder, tokenizer: Tokenizer) -> Blanks | None:
    """Special tokens by which an infilling model continues a text; None for a left-to-right model.

    Raises:
        InputError: the tokenizer is not the model's.
    """
    tokenizer.check_fits(model.config.vocab_size, fix="give the tokenizer that the model was trained with")
    return Blanks.of(tokenizer) if model.config.objective == "glm" else None


def _encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    encoded = [tokenizer.encode(prompt, bos=tokenizer.add_bos) for prompt in prompts]
    for i, ids in enumerate(encoded):
        if not ids:
            if tokenizer.bos_id is None:
                raise InputError("an empty prompt", where=f"prompt {i + 1}", fix="give at least one character")
            ids.append(tokenizer.bos_id)
    return encoded


def check_room(lengths: Sequence[int], context: int, name: str) -> None:
    """Context length check; `name` is that in the message, a prompt or a text."""
    for i, length in enumerate(lengths):
        if length >= context:
            raise InputError(
                f"the {name} fills the model's context and leaves no room for an answer",
                where=f"{name} {i + 1}",
                found=f"{length} tokens",
                expected=f"fewer than {context}",
                fix=f"shorten the {name}",
            )


def chunks(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    decoding: Decoding = decode,
) -> Iterator[tuple[Chunk, int]]:
    """Streaming batched generation: yields (chunk, token id) as text becomes final.

    Args:
        model: the decoder.
        tokenizer: its tokenizer.
        prompts: texts of any length.
        max_new_tokens: tokens per prompt at most.
        sampling: sampling settings; `Sampling()` unless given.
        stop: strings that end a sequence; they are not part of the text.
        ignore_eos: go on after the end-of-text token.
        decoding: decoding strategy; `functools.partial` gives `decode` its own options.

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
    steps = decoding(model, read, max_new_tokens, sampling or Sampling())
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
            yield Chunk(row, shown, reason), token


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    decoding: Decoding = decode,
) -> list[Completion]:
    """Batched generation of several prompts. The arguments are those of `chunks`.

    Returns:
        One completion per prompt, in order, without the prompt.
    """
    text = ["" for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    reasons: list[Reason] = ["length" for _ in prompts]
    for chunk, token in chunks(model, tokenizer, prompts, max_new_tokens, sampling, stop, ignore_eos, decoding):
        text[chunk.row] += chunk.text
        tokens[chunk.row].append(token)
        reasons[chunk.row] = chunk.reason or reasons[chunk.row]
    return [Completion(t, tuple(ids), r) for t, ids, r in zip(text, tokens, reasons, strict=True)]


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    decoding: Decoding = decode,
) -> Iterator[Chunk]:
    """Streaming generation of one prompt, chunk by chunk, never half a character or part of a stop string."""
    for chunk, _ in chunks(model, tokenizer, [prompt], max_new_tokens, sampling, stop, ignore_eos, decoding):
        if chunk.text or chunk.reason:
            yield chunk
