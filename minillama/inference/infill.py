"""Infilling of masked spans by a model trained for it (GLM)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from minillama.errors import InputError
from minillama.inference.engine import Engine
from minillama.inference.generate import blanks_of, check_room, end_ids
from minillama.inference.request import GREEDY, FinishReason, Request
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.blanks import BLANK_TOKENS, Blanks, Layout

# A space in front of a mask belongs to the infilled span, as it does to a word.
_MASK = re.compile("( ?)(" + "|".join(map(re.escape, BLANK_TOKENS[:3])) + ")")
_STRIDE = 1_000_003  # between the seeds of a sequence's spans; no batch has as many sequences


@dataclass(frozen=True)
class Filled:
    """Infilled sequence.

    Args:
        text: the whole of it.
        spans: the infilled spans, in the order of the text.
        reasons: finish reason per span, as of a `Completion`.
    """

    text: str
    spans: tuple[str, ...]
    reasons: tuple[FinishReason, ...]


def lay_out(texts: Sequence[str], masks: Sequence[int], tokenizer: Tokenizer) -> tuple[Layout, list[int]]:
    """Part A: texts joined by mask tokens, behind BOS if the tokenizer adds it, and the masks' positions."""
    ids = [tokenizer.bos_id] if tokenizer.add_bos else []
    ids += tokenizer.encode(texts[0])
    positions = []
    for mask, text in zip(masks, texts[1:], strict=True):
        positions.append(len(ids))
        ids += [mask, *tokenizer.encode_inside(text)]
    return Layout.of(ids), positions


class MaskedText:
    """Text split at its mask tokens.

    Args:
        text: with [MASK], [sMASK] or [gMASK] per masked span.
        tokenizer: its tokenizer.
        where: the text's name in a message.

    Raises:
        InputError: there is no mask in it.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, where: str = "the text") -> None:
        parts = _MASK.split(text)  # text, space, mask, text, space, mask, ..., text
        self.texts, self.spaces = parts[::3], parts[1::3]
        if not self.spaces:
            expected = "[MASK], [sMASK] or [gMASK] in it"
            raise InputError("there is no mask to fill", where=where, found=text[:80], expected=expected)
        ids = dict(zip(BLANK_TOKENS, Blanks.of(tokenizer).masks, strict=False))
        self.layout, self.positions = lay_out(self.texts, [ids[mask] for mask in parts[2::3]], tokenizer)

    def join(self, spans: Sequence[str]) -> str:
        """Text with its masked spans filled."""
        out = self.texts[0]
        for space, span, text in zip(self.spaces, spans, self.texts[1:], strict=True):
            out += (space if span and not span[0].isspace() else "") + span + text
        return out


def infill(
    model: Decoder, tokenizer: Tokenizer, texts: Sequence[str], max_new_tokens: int = 64, sampling: Sampling = GREEDY
) -> list[Filled]:
    """Infilling of several sequences in one batch: spans from left to right, conditioned on those before.

    Args:
        model: a decoder whose objective is blank infilling.
        tokenizer: its tokenizer.
        texts: each with one or more of [MASK] (a few words), [sMASK] (a sentence) and [gMASK] (a long text).
        max_new_tokens: tokens per span at most.
        sampling: sampling settings.

    Raises:
        InputError: a model of another objective, a text without a mask, or one that fills the context.
    """
    start, ends = require_infilling(model, tokenizer).start, end_ids(model, tokenizer)
    context = model.config.max_seq_len
    masked = [MaskedText(text, tokenizer, f"text {i + 1}") for i, text in enumerate(texts)]
    layouts = [text.layout for text in masked]
    for i, layout in enumerate(layouts):
        check_room(len(layout.tokens) + 1, context, f"text {i + 1}")
    spans: list[list[str]] = [[] for _ in masked]
    reasons: list[list[FinishReason]] = [[] for _ in masked]
    engine = Engine(model, max(1, len(texts)), chunk=None)
    for k in range(max((len(text.positions) for text in masked), default=0)):
        requests: dict[int, Request] = {}
        for i, text in enumerate(masked):
            if k < len(text.positions):
                opened = layouts[i].fill(text.positions[k], [start])
                requests[i] = Request(opened, max_new_tokens, sampling, sampling.seed + i + k * _STRIDE, ends)
        engine.run([request for request in requests.values() if len(request.ids) < context])
        for i, request in requests.items():
            ids = request.tokens[:-1] if request.finish_reason == "eos" else request.tokens
            layouts[i] = layouts[i].fill(masked[i].positions[k], [start, *ids])
            spans[i].append(tokenizer.decode(ids))
            reasons[i].append(request.finish_reason or "context")
    found = zip(masked, spans, reasons, strict=True)
    return [Filled(text.join(parts), tuple(parts), tuple(why)) for text, parts, why in found]


def require_infilling(model: Decoder, tokenizer: Tokenizer) -> Blanks:
    """Special tokens of an infilling model.

    Raises:
        InputError: it is none, or the tokenizer is not its own.
    """
    blanks = blanks_of(model, tokenizer)
    if blanks is None:
        raise InputError(
            "this model was not trained for infilling",
            where="objective",
            found=model.config.objective,
            expected="glm",
            fix="train one: python train.py --model.preset glm-tiny",
        )
    return blanks
