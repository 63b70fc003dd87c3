"""GLM's text with blanks: part A with a mask for each blank, then part B that fills them, one blank after another.

Du et al. 2022, arXiv 2103.10360, §2.1. Training, infilling, generation and cloze questions all lay text out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.errors import InputError
from minillama.tokenizer import Tokenizer

__all__ = ["BLANK_TOKENS", "Blanks", "Layout", "Rows", "collate"]

BLANK_TOKENS = ("[MASK]", "[sMASK]", "[gMASK]", "<sop>", "<eop>")


class Layout(NamedTuple):
    """Tokens in the order in which they are read, and where each of them stands.

    Args:
        tokens: (N,) ids.
        places: (N,) pairs: the place in part A, for a token of part B that of its mask; and the place in the
            blank, counted from 1, 0 in part A.
        prefix: |A|, the tokens that see each other in both directions.
    """

    tokens: list[int]
    places: list[tuple[int, int]]
    prefix: int

    @classmethod
    def of(cls, part_a: Sequence[int]) -> Layout:
        """Part A alone."""
        return cls(list(part_a), [(place, 0) for place in range(len(part_a))], len(part_a))

    def fill(self, place: int, ids: Sequence[int]) -> Layout:
        """One more blank of part B: its mask's place, and what is read there, the start token first."""
        within = [(place, step) for step in range(1, len(ids) + 1)]
        return Layout([*self.tokens, *ids], [*self.places, *within], self.prefix)


class Rows(NamedTuple):
    """Layouts padded on the right to one length T, and what they predict.

    Args:
        tokens: (N, T) ids.
        targets: (N, T) ids.
        weights: (N, T) 1 in part B, 0 in part A and in padding.
        positions: (N, 2, T).
        prefix: (N,) |A|.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    prefix: Tensor


def collate(layouts: Sequence[Layout], targets: Sequence[Sequence[int]], length: int) -> Rows:
    """Rows of layouts.

    Args:
        layouts: N of them.
        targets: for each what is predicted in part B, slot by slot.
        length: T.
    """
    shape = len(layouts), length
    tokens, wanted = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    positions, weights = torch.zeros(len(layouts), 2, length, dtype=torch.long), torch.zeros(shape)
    for row, (layout, ids) in enumerate(zip(layouts, targets, strict=True)):
        size = len(layout.tokens)
        tokens[row, :size] = torch.tensor(layout.tokens)
        positions[row, :, :size] = torch.tensor(layout.places).T
        wanted[row, layout.prefix : size] = torch.tensor(ids)
        weights[row, layout.prefix : size] = 1
    return Rows(tokens, wanted, weights, positions, torch.tensor([layout.prefix for layout in layouts]))


@dataclass(frozen=True)
class Blanks:
    """The ids of the marks.

    Args:
        token: stands for a span of tokens.
        sentence: stands for a sentence.
        document: stands for a long stretch of text, as a rule up to its end.
        start: the first token that is read in a blank.
        end: the last that is predicted there.
    """

    token: int
    sentence: int
    document: int
    start: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Blanks:
        """Those of a tokenizer.

        Raises:
            InputError: it lacks one.
        """
        found = ((name, tokenizer.backend.token_to_id(name)) for name in BLANK_TOKENS)
        ids = {name: i for name, i in found if i is not None}
        missing = [name for name in BLANK_TOKENS if name not in ids]
        if missing:
            raise InputError(
                "this tokenizer has no marks for blanks",
                where="tokenizer",
                found=f"no {', '.join(missing)}",
                expected=", ".join(BLANK_TOKENS),
                fix="give the model's own tokenizer; `minillama tokenizer train --special` makes new ones",
            )
        return cls(*ids.values())

    @property
    def masks(self) -> tuple[int, int, int]:
        """The ids that stand for a blank in part A."""
        return self.token, self.sentence, self.document

    def continuation(self, ids: Sequence[int]) -> Layout:
        """A text whose rest is one blank, open for its first token."""
        return Layout.of([*ids, self.document]).fill(len(ids), [self.start])
