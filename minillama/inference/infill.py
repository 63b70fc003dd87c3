"""Infilling of masked spans by a model trained for it (GLM)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from minillama.errors import InputError
from minillama.inference.engine import decode
from minillama.inference.generate import Reason, blanks_of, check_room
from minillama.inference.request import GREEDY
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
        blanks: the infilled spans, in the order of the text.
        reasons: finish reason per span, as of a `Completion`.
    """

    text: str
    blanks: tuple[str, ...]
    reasons: tuple[Reason, ...]


def lay_out(texts: Sequence[str], masks: Sequence[int], tokenizer: Tokenizer) -> tuple[Layout, list[int]]:
    """Part A: texts joined by mask tokens, behind BOS if the tokenizer adds it, and the masks' positions."""
    ids = [tokenizer.bos_id] if tokenizer.add_bos else []
    places = []
    for i, text in enumerate(texts):
        if i:
            places.append(len(ids))
            ids.append(masks[i - 1])
        ids += tokenizer.encode_inside(text) if i else tokenizer.encode(text)
    return Layout.of(ids), places


class Cut:
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
            what = "there is no blank to fill"
            raise InputError(what, where=where, found=text[:80], expected="[MASK], [sMASK] or [gMASK] in it")
        ids = dict(zip(BLANK_TOKENS, Blanks.of(tokenizer).masks, strict=False))
        self.layout, self.places = lay_out(self.texts, [ids[mask] for mask in parts[2::3]], tokenizer)

    def join(self, blanks: Sequence[str]) -> str:
        """Text with its masked spans filled."""
        out = self.texts[0]
        for space, blank, text in zip(self.spaces, blanks, self.texts[1:], strict=True):
            out += (space if blank and not blank[0].isspace() else "") + blank + text
        return out


def infill(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
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
    blanks = require_infilling(model, tokenizer)
    cuts = [Cut(text, tokenizer, f"text {i + 1}") for i, text in enumerate(texts)]
    layouts = [cut.layout for cut in cuts]
    check_room([len(layout.tokens) + 1 for layout in layouts], model.config.max_seq_len, "text")
    written: list[list[str]] = [[] for _ in cuts]
    reasons: list[list[Reason]] = [[] for _ in cuts]
    ends = {tokenizer.eos_id, blanks.end, *model.stop_ids}
    for k in range(max((len(cut.places) for cut in cuts), default=0)):
        rows = [i for i, cut in enumerate(cuts) if k < len(cut.places)]
        opened = {i: layouts[i].fill(cuts[i].places[k], [blanks.start]) for i in rows}
        fits = [i for i in rows if len(opened[i].tokens) < model.config.max_seq_len]
        seeds = [sampling.seed + i + k * _STRIDE for i in fits]
        filled = _fill(model, [opened[i] for i in fits], ends, max_new_tokens, sampling, seeds) if fits else []
        found: dict[int, tuple[list[int], Reason]] = dict(zip(fits, filled, strict=True))
        for i in rows:
            ids, reason = found.get(i, ([], "context"))
            layouts[i] = layouts[i].fill(cuts[i].places[k], [blanks.start, *ids])
            written[i].append(tokenizer.decode(ids))
            reasons[i].append(reason)
    return [
        Filled(cut.join(parts), tuple(parts), tuple(why))
        for cut, parts, why in zip(cuts, written, reasons, strict=True)
    ]


def require_infilling(model: Decoder, tokenizer: Tokenizer) -> Blanks:
    """Special tokens of an infilling model.

    Raises:
        InputError: it is none, or the tokenizer is not its own.
    """
    blanks = blanks_of(model, tokenizer)
    if blanks is None:
        raise InputError(
            "this model was not trained to fill blanks",
            where="objective",
            found=model.config.objective,
            expected="glm",
            fix="train one: python train.py --model.preset glm-tiny",
        )
    return blanks


def _fill(
    model: Decoder,
    layouts: Sequence[Layout],
    ends: set[int],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
) -> list[tuple[list[int], Reason]]:
    """Tokens of each layout's last masked span, and finish reason."""
    tokens: list[list[int]] = [[] for _ in layouts]
    reasons: list[Reason] = ["context"] * len(layouts)
    steps = decode(model, layouts, max_new_tokens, sampling, seeds=seeds)
    ended: set[int] | None = None
    while True:
        try:
            step = steps.send(ended)
        except StopIteration:
            return list(zip(tokens, reasons, strict=True))
        ended = {row for row, token in step if token in ends}
        for row, token in step:
            if row in ended:
                reasons[row] = "eos"
                continue
            tokens[row].append(token)
            if len(tokens[row]) == max_new_tokens:
                reasons[row] = "length"
