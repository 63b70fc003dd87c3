"""GLM autoregressive blank infilling: part A with mask tokens, then part B, the masked spans one after another.

Du et al. 2022, arXiv 2103.10360, §2.1. The sequence layout of training, infilling, generation and cloze questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.errors import InputError
from minillama.tokenizer import Tokenizer

BLANK_TOKENS = ("[MASK]", "[sMASK]", "[gMASK]", "<sop>", "<eop>")


class Layout(NamedTuple):
    """A sequence with its 2D position ids.

    Args:
        tokens: (N,) ids.
        positions: (N,) pairs: position in part A, for a token of part B that of its mask; and within the span,
            from 1, 0 in part A.
        prefix: |A|, the length of the bidirectional prefix.
    """

    tokens: list[int]
    positions: list[tuple[int, int]]
    prefix: int

    @classmethod
    def of(cls, part_a: Sequence[int]) -> Layout:
        """Part A alone."""
        return cls(list(part_a), [(position, 0) for position in range(len(part_a))], len(part_a))

    def fill(self, mask: int, ids: Sequence[int]) -> Layout:
        """Append a span to part B: the position of its mask, and its inputs, the start token first."""
        within = [(mask, step) for step in range(1, len(ids) + 1)]
        return Layout([*self.tokens, *ids], [*self.positions, *within], self.prefix)


class Rows(NamedTuple):
    """A batch of layouts, right-padded to one length T, with targets."""

    tokens: Tensor  # (N, T) ids
    targets: Tensor  # (N, T) ids
    weights: Tensor  # (N, T) 1 in part B, 0 in part A and in padding
    positions: Tensor  # (N, 2, T)
    prefix: Tensor  # (N,) |A|


def collate(layouts: Sequence[Layout], targets: Sequence[Sequence[int]], length: int) -> Rows:
    """Batch of layouts, padded to `length` T; the targets are those of part B, per layout."""
    shape = len(layouts), length
    tokens, wanted = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    positions, weights = torch.zeros(len(layouts), 2, length, dtype=torch.long), torch.zeros(shape)
    for row, (layout, ids) in enumerate(zip(layouts, targets, strict=True)):
        size = len(layout.tokens)
        tokens[row, :size] = torch.tensor(layout.tokens)
        positions[row, :, :size] = torch.tensor(layout.positions).T
        wanted[row, layout.prefix : size] = torch.tensor(ids)
        weights[row, layout.prefix : size] = 1
    return Rows(tokens, wanted, weights, positions, torch.tensor([layout.prefix for layout in layouts]))


@dataclass(frozen=True)
class Blanks:
    """Ids of GLM's special tokens: `BLANK_TOKENS`."""

    token: int  # mask of a token span
    sentence: int  # mask of a sentence
    document: int  # mask of a document-level span, as a rule up to the end
    start: int  # the first input of a span
    end: int  # the last target of a span

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Blanks:
        """The ids in a tokenizer.

        Raises:
            InputError: it lacks one of the tokens.
        """
        ids = [tokenizer.backend.token_to_id(name) for name in BLANK_TOKENS]
        missing = [name for name, i in zip(BLANK_TOKENS, ids, strict=True) if i is None]
        if missing:
            raise InputError(
                "this tokenizer has no special tokens for infilling",
                where="tokenizer",
                found=f"no {', '.join(missing)}",
                expected=", ".join(BLANK_TOKENS),
                fix="give the model's own tokenizer; `minillama tokenizer train --special` makes new ones",
            )
        return cls(*(i for i in ids if i is not None))

    @property
    def masks(self) -> tuple[int, int, int]:
        """Ids of the mask tokens."""
        return self.token, self.sentence, self.document

    def continuation(self, ids: Sequence[int]) -> Layout:
        """Prompt of left-to-right generation: [gMASK] behind it, unless it is there, and the start of its span."""
        if list(ids[-2:]) == [self.document, self.start]:  # of a chat template
            ids = ids[:-2]
        return Layout.of([*ids, self.document]).fill(len(ids), [self.start])
