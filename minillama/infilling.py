"""Filling the blanks of a text, with a model that was trained to (GLM)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minillama.blanks import BLANK_TOKENS, Layout
from minillama.errors import InputError
from minillama.generation import GREEDY, Reason, blanks_of, decode
from minillama.model import Decoder
from minillama.sampling import Sampling
from minillama.tokenizer import Tokenizer

__all__ = ["Cut", "Filled", "infill"]

# A blank space in front of a mask belongs to what is filled in, as it belongs to a word.
_MASK = re.compile("( ?)(" + "|".join(map(re.escape, BLANK_TOKENS[:3])) + ")")


@dataclass(frozen=True)
class Filled:
    """A text whose blanks are filled.

    Args:
        text: the whole of it.
        blanks: what stands in each blank, in the order of the text.
        reasons: why each ended, as of a `Completion`.
    """

    text: str
    blanks: tuple[str, ...]
    reasons: tuple[Reason, ...]


class Cut:
    """A text taken apart at its masks.

    Args:
        text: with [MASK], [sMASK] or [gMASK] where something is missing.
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
        ids = [tokenizer.bos_id] if tokenizer.add_bos else []
        self.places: list[int] = []
        # Vocabularies of SentencePiece's make put a space in front of a text themselves.
        adds_space = tokenizer.normalized("a") != "a" and not tokenizer.normalized("a")[0].isalpha()
        for i, part in enumerate(self.texts):
            ids += tokenizer.encode(part.removeprefix(" ") if adds_space and i else part) if part else []
            if i < len(self.spaces):
                self.places.append(len(ids))
                ids.append(tokenizer.encode(parts[3 * i + 2], special=True)[-1])
        self.layout = Layout.of(ids)

    def join(self, blanks: Sequence[str]) -> str:
        """The text with its blanks filled."""
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
    """Fill the blanks of several texts in one batch, those of a text from left to right, each seeing those before.

    Args:
        model: a decoder whose objective is blank infilling.
        tokenizer: its tokenizer.
        texts: each with one or more of [MASK] (a few words), [sMASK] (a sentence) and [gMASK] (a long text).
        max_new_tokens: tokens a blank at most.
        sampling: how tokens are chosen.

    Raises:
        InputError: a model of another objective, a text without a blank, or one that fills the context.
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
    cuts = [Cut(text, tokenizer, f"text {i + 1}") for i, text in enumerate(texts)]
    layouts = [cut.layout for cut in cuts]
    written: list[list[str]] = [[] for _ in cuts]
    reasons: list[list[Reason]] = [[] for _ in cuts]
    for k in range(max((len(cut.places) for cut in cuts), default=0)):
        rows = [i for i, cut in enumerate(cuts) if k < len(cut.places)]
        opened = [layouts[i].fill(cuts[i].places[k], [blanks.start]) for i in rows]
        _check_room(opened, rows, model.config.max_seq_len)
        seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + k)
        filled = _fill(model, opened, {tokenizer.eos_id, blanks.end}, max_new_tokens, seeded)
        for i, (ids, reason) in zip(rows, filled, strict=True):
            layouts[i] = layouts[i].fill(cuts[i].places[k], [blanks.start, *ids])
            written[i].append(tokenizer.decode(ids))
            reasons[i].append(reason)
    return [
        Filled(cut.join(parts), tuple(parts), tuple(why))
        for cut, parts, why in zip(cuts, written, reasons, strict=True)
    ]


def _fill(
    model: Decoder, layouts: Sequence[Layout], ends: set[int], max_new_tokens: int, sampling: Sampling
) -> list[tuple[list[int], Reason]]:
    """The tokens of each layout's last blank, and why it ended."""
    tokens: list[list[int]] = [[] for _ in layouts]
    reasons: list[Reason] = ["context"] * len(layouts)
    steps = decode(model, layouts, max_new_tokens, sampling)
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


def _check_room(layouts: Sequence[Layout], rows: Sequence[int], context: int) -> None:
    for row, layout in zip(rows, layouts, strict=True):
        if len(layout.tokens) >= context:
            raise InputError(
                "the text and what was filled in leave no room in the model's context",
                where=f"text {row + 1}",
                found=f"{len(layout.tokens)} tokens",
                expected=f"fewer than {context}",
                fix="shorten the text, or lower --max-new-tokens",
            )
