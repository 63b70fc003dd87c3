"""Text generation: prompts in, completions out, stop strings, streaming."""

from __future__ import annotations

import operator
from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from minillama.config.arguments import Count, checked
from minillama.config.loader import build, is_index, nearest
from minillama.errors import InputError
from minillama.inference.chat import ChatPrompts, Prompt, chat_ids, is_messages
from minillama.inference.engine import Engine
from minillama.inference.request import FinishReason, Request, check_ids
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.blanks import Blanks

KEYWORDS = ("max_new_tokens", "sampling", "stop", "ignore_eos", "engine", "chat", "logprobs")  # beside the sampling's


@dataclass(frozen=True)
class Chunk:
    """Streamed chunk: new text of one sequence, its tokens, and its finish reason, if it ended.

    `reason` is `eos` (the model generated the end-of-text token), `stop` (a stop string), or another of a `Request`.
    """

    row: int
    text: str
    tokens: tuple[int, ...]
    reason: FinishReason | None = None
    log_probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Completion:
    """Completion of one prompt, whole; ln p of each token where `logprobs` is set."""

    text: str
    tokens: tuple[int, ...]
    reason: FinishReason
    log_probabilities: tuple[float, ...] = ()


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

        Text before the earliest stop string is emitted, text after it is not. A match is one when no other that began
        before it may be completed, so that where a text is cut does not depend on how it comes in.
        """
        self.held += text
        found = min((at for at in map(self.held.find, self.stops) if at >= 0), default=len(self.held))
        begun = max((n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n])), default=0)
        end = min(found, len(self.held) - begun)
        is_stop = found < len(self.held) and found == end
        shown, self.held = self.held[:end], "" if is_stop else self.held[end:]
        return shown, is_stop

    def flush(self) -> str:
        """Text held back, at the end; up to a stop string in it."""
        held, self.held = self.held, ""
        return held[: min((at for at in map(held.find, self.stops) if at >= 0), default=len(held))]


class _Text:
    """Text of a request's tokens, behind the ids of its prompt, as it becomes final; the request's stop condition.

    What a chat template writes in front of an answer, `lead`, is no part of it.
    """

    def __init__(self, row: int, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str], lead: str) -> None:
        self.row, self.decoder, self.filter = row, tokenizer.stream(after=prompt), StopText(stop)
        self.text, self.stopped, self.taken = "", False, 0
        self.lead, self.begun = lead, ""

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Decode the last token; whether a stop string ends the text."""
        self._push(self.decoder.push(tokens[-1]))
        return self.stopped

    def _push(self, text: str) -> None:
        if self.lead:
            self.begun += text
            if self.begun != self.lead and self.lead.startswith(self.begun):
                return
            text, self.lead = self.begun.removeprefix(self.lead), ""
        shown, self.stopped = self.filter.push(text)
        self.text += shown

    def chunk(self, request: Request) -> Chunk | None:
        """Text and tokens since the last chunk, if there is text or the request has ended."""
        reason = request.finish_reason
        if reason is not None and not self.stopped:
            self._push(self.decoder.flush())
            held, rest = self.filter.held, self.filter.flush()
            self.text, self.stopped = self.text + rest, self.stopped or rest != held
        if not self.text and reason is None:
            return None
        text, start = self.text, self.taken
        self.text, self.taken = "", len(request.tokens)
        tokens, chosen = tuple(request.tokens[start:]), tuple(request.log_probabilities[start:])
        return Chunk(self.row, text, tokens, "stop" if self.stopped else reason, chosen)


def end_ids(model: Decoder, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, the model's own, and of an infilling model the end of a span."""
    blanks = blanks_of(model, tokenizer)
    ids = {*tokenizer.stop_ids, *model.stop_ids, blanks.end if blanks else None}
    return frozenset(token for token in ids if token is not None)


def blanks_of(model: Decoder, tokenizer: Tokenizer) -> Blanks | None:
    """Special tokens by which an infilling model continues a text; None for a left-to-right model.

    Raises:
        InputError: the tokenizer is not the model's.
    """
    fix = "give the tokenizer that the model was trained with"
    tokenizer.check_fits(model.config.vocab_size, fix=fix, spares_special=True)
    return Blanks.of(tokenizer) if model.config.objective == "glm" else None


def check_room(length: int, context: int, where: str) -> None:
    """Context length check; `where` names a prompt or a text and its number."""
    if length >= context:
        name = where.split()[0]
        raise InputError(
            f"the {name} fills the model's context and leaves no room for an answer",
            where=where,
            found=f"{length} tokens",
            expected=f"fewer than {context}",
            fix=f"shorten the {name}",
        )


@checked
def stream(
    model: Decoder,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    max_new_tokens: Count = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] | Set[str] = (),
    ignore_eos: bool = False,
    engine: Engine | None = None,
    chat: bool | ChatPrompts = False,
    logprobs: bool = False,
    skips_long: bool = False,
    **settings: Any,
) -> Generator[Chunk, None, None]:
    """Streaming generation, chunk by chunk, never half a character or part of a stop string.

    The last chunk of each sequence has its finish reason.

    Args:
        tokenizer: its tokenizer, a `Tokenizer` or one of transformers, which is converted at each call.
        prompt: a text, or several, of any length, which share a batch; token ids, a list or a tensor, are taken as they
            are, messages (`[{"role": "user", "content": ...}]`) by the tokenizer's chat template.
        max_new_tokens: tokens per prompt at most.
        sampling: sampling settings; `Sampling()` unless given. Prompt i has seed + i.
        stop: strings that end a sequence; they are not part of the text.
        ignore_eos: go on after the end-of-text token.
        engine: of this model; one for all prompts at once unless given.
        chat: texts are questions for the chat template, too, and not to be continued; or the encoder of such prompts.
        logprobs: ln p of each token, of the model's distribution before temperature and the other settings.
        skips_long: a prompt that fills the context is no error, but gets an empty text, with the reason `context`.
        settings: fields of `Sampling` by name, as `temperature=0`, in place of those of `sampling`.

    Raises:
        InputError: a prompt that does not fit the context, an empty stop string, a foreign tokenizer, an unknown
            or invalid setting.
    """
    if "" in stop:
        raise InputError("an empty stop string", where="stop", fix="leave it out")
    _check_names(settings)
    tokenizer, prompts = Tokenizer.from_transformers(tokenizer), _several(prompt)
    asked, questions = chat_ids(tokenizer, prompts, chat)
    blanks, sampling = blanks_of(model, tokenizer), build(Sampling, settings, base=sampling or Sampling())
    stop_ids = end_ids(model, tokenizer) | (questions.stop_ids if questions else frozenset())
    ends = frozenset[int]() if ignore_eos else stop_ids
    texts: dict[Request, _Text] = {}
    for row, each in enumerate(asked):
        ids = encode(tokenizer, each, f"prompt {row + 1}")
        check_ids(ids, model.config.vocab_size, f"prompt {row + 1}")
        lead = questions.lead if questions and each is not prompts[row] else ""  # of a prompt by the template
        read, text = blanks.continuation(ids) if blanks else ids, _Text(row, tokenizer, ids, tuple(stop), lead)
        request = Request(read, max_new_tokens, sampling, sampling.seed + row, ends, text, logprobs)
        if skips_long and len(request.ids) >= model.config.max_seq_len:
            yield Chunk(row, "", (), "context")
            continue
        check_room(len(request.ids), model.config.max_seq_len, f"prompt {row + 1}")
        texts[request] = text
    engine = engine or Engine(model, max(1, len(texts)), chunk=None)
    if engine.model is not model:
        raise InputError("this engine decodes another model", where="engine", fix="give Engine(model), or none")
    yield from _decode(engine, texts)


def _decode(engine: Engine, texts: dict[Request, _Text]) -> Iterator[Chunk]:
    """Chunks of the requests until all are finished; those that are not are canceled."""
    try:
        for request in texts:
            engine.submit(request)
        while texts:
            moved = [request for request in engine.step() if request in texts]
            for request in moved or [request for request in texts if request.finish_reason is not None]:
                chunk = texts[request].chunk(request)
                if request.finish_reason is not None:
                    del texts[request]
                if chunk is not None:
                    yield chunk
    finally:
        for request in texts:
            engine.cancel(request)


def _check_names(settings: Mapping[str, Any]) -> None:
    known = [one.name for one in fields(Sampling)]
    for name in settings.keys() - {*known}:
        near = nearest(name, [*KEYWORDS, *known])
        expected, fix = f"one of {', '.join([*KEYWORDS, *known])}", f"did you mean {near!r}?" if near else None
        raise InputError(f"unknown key {name!r}", where="generate", expected=expected, fix=fix)


def _several(prompt: Prompt | Sequence[Prompt]) -> Sequence[Any]:
    """Prompts, also of one that is a text, messages, or token ids."""
    given: Any = _listed(prompt, 2, "prompts")
    is_one = isinstance(given, str) or is_messages(given) or (len(given) > 0 and is_index(given[0]))
    return [given] if is_one else given


def _listed(prompt: Any, dimensions: int, where: str) -> Any:
    """Ids of a tensor or array as lists; others as they are.

    Raises:
        InputError: a tensor that is not of whole numbers, or of other dimensions than 1 to `dimensions`.
    """
    if not hasattr(prompt, "tolist"):
        return prompt
    if "int" not in str(prompt.dtype) or not 1 <= prompt.ndim <= dimensions:
        found = f"{prompt.dtype} of shape {tuple(prompt.shape)}"
        expected = f"whole numbers in {' or '.join(map(str, range(1, dimensions + 1)))} dimensions"
        raise InputError("these are no token ids", where=where, found=found, expected=expected)
    return prompt.tolist()


def encode(tokenizer: Tokenizer, prompt: str | Sequence[int] | Tensor, where: str) -> list[int]:
    """Token ids of a prompt, with BOS if the tokenizer adds it; BOS alone for an empty one. Ids stay as they are.

    Raises:
        InputError: an empty prompt, and a tokenizer without BOS; a tensor of other things than ids.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, bos=tokenizer.add_bos)
    else:
        ids = list(map(operator.index, _listed(prompt, 1, where)))
    if not ids and tokenizer.bos_id is None:
        raise InputError("an empty prompt", where=where, fix="give at least one character")
    return ids or [tokenizer.bos_id]


@checked
def generate(
    model: Decoder,
    tokenizer: Any,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: Count = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] | Set[str] = (),
    ignore_eos: bool = False,
    engine: Engine | None = None,
    chat: bool | ChatPrompts = False,
    logprobs: bool = False,
    skips_long: bool = False,
    **settings: Any,
) -> list[Completion]:
    """Batched generation of several prompts, or of one. The arguments are those of `stream`.

    Returns:
        One completion per prompt, in order, without the prompt.
    """
    rows: list[list[Chunk]] = [[] for _ in _several(prompts)]
    options = (max_new_tokens, sampling, stop, ignore_eos, engine, chat, logprobs, skips_long)
    for chunk in stream(model, tokenizer, prompts, *options, **settings):
        rows[chunk.row].append(chunk)
    return [
        Completion(
            "".join(chunk.text for chunk in row),
            tuple(token for chunk in row for token in chunk.tokens),
            row[-1].reason or "length",
            tuple(value for chunk in row for value in chunk.log_probabilities),
        )
        for row in rows
    ]
