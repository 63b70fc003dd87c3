"""Numbers of half a byte: groups of whole numbers on a grid of a scale and an offset, and the search for the grid.

Grids are rounded before the whole numbers are chosen, to what bfloat16 (the products here) and float16 (GGUF's Q4_1)
both hold, so that a file and a product have the same weights to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.errors import InputError

__all__ = ["GROUP", "LOW", "Int4", "search", "storable"]

GROUP = 32
LOW, HIGH = -8, 7  # of a whole number
CHUNK = 2**17  # weights that are worked on at once, so that they stay in the cache
LEAST = 2.0**-24  # float16's least number above 0
SHRINKS = (1.0, 0.9, 0.8)  # of a group's span, to be tried
MORE = tuple(1.05 - 0.05 * i for i in range(12))  # where errors count unequally


class Int4(NamedTuple):
    """A matrix w = q s + z, q in -8..7, one s and z for a group of inputs.

    Attributes:
        nibbles: (O, I / 2) uint8. 16 of them hold 32 inputs as in GGUF: byte j has q + 8 of input j in its low half
            and that of input j + 16 in its high half.
        scale: (O, I / group) float32.
        offset: (O, I / group) float32.
    """

    nibbles: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def of(cls, weight: Tensor, group: int = GROUP, importance: Tensor | None = None) -> Int4:
        """The numbers that `search` finds for a matrix, with importance among more grids.

        Args:
            weight: (O, I), I a multiple of `group`.
            group: inputs that share a grid, a multiple of 32.
            importance: (I,) weights of the squared errors; 1 unless given.

        Raises:
            InputError: finite weights whose grid is beyond float16; an importance that is no finite number.
        """
        if importance is not None and not importance.isfinite().all():
            raise InputError(
                "the calibrating text makes inputs of a product that are no finite numbers",
                where="calibration",
                found=f"{(~importance.isfinite()).sum()} of {importance.numel()} inputs",
                fix="check the model, or quantize without a text",
            )
        rows = max(1, CHUNK // weight.shape[1])
        parts = []
        for part in weight.split(rows):
            wide = part.float().unflatten(-1, (-1, group))
            if importance is None:
                scale, offset = search(wide)
            else:
                scale, offset = search(wide, importance.view(-1, group), MORE, rounds=3)
            lost = offset.isnan()
            if lost.any() and (lost := lost & wide.isfinite().all(-1, keepdim=True)).any():
                raise InputError(
                    "weights too large for int4, whose grids are float16",
                    found=f"{wide[lost.squeeze(-1)].abs().max():g}",
                    expected="at most 65504 in size",
                    fix="take int8",
                )
            steps = ((wide - offset) / scale).round_().clamp_(LOW, HIGH)
            parts.append(cls.packed(steps.flatten(-2), scale.squeeze(-1), offset.squeeze(-1)))
        return cls.stacked(parts)

    @classmethod
    def packed(cls, steps: Tensor, scale: Tensor, offset: Tensor) -> Int4:
        """Of q (O, I), whole numbers of any type, s and z."""
        low, high = (steps - LOW).to(torch.uint8).unflatten(-1, (-1, 2, 16)).unbind(-2)
        return cls((low | high << 4).flatten(-2), scale, offset)

    @classmethod
    def stacked(cls, parts: Iterable[Int4]) -> Int4:
        """The rows of several matrices of as many inputs, one below the other."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    @property
    def group(self) -> int:
        """Inputs that share a grid."""
        return self.nibbles.shape[1] * 2 // self.scale.shape[1]

    @property
    def unsigned(self) -> Tensor:
        """(O, I) uint8, q + 8."""
        pairs = self.nibbles.unflatten(-1, (-1, 16))
        return torch.stack((pairs & 15, pairs >> 4), dim=-2).flatten(-3)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(O, I), multiplied out some rows at a time."""
        inputs = self.nibbles.shape[1] * 2
        made = torch.empty(len(self.nibbles), inputs, dtype=dtype)
        rows = max(1, CHUNK // inputs)
        for part, *numbers in zip(made.split(rows), *(tensor.split(rows) for tensor in self), strict=True):
            some = Int4(*numbers)
            steps = some.unsigned.unflatten(-1, (-1, self.group)).float().add_(LOW)
            scale, offset = (grid.float().unsqueeze(-1) for grid in (some.scale, some.offset))
            part.copy_(torch.addcmul(offset, steps, scale).flatten(-2))
        return made

    def rows(self, start: int, end: int) -> Int4:
        """Some of the rows."""
        return Int4(*(tensor[start:end] for tensor in self))


def storable(scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest s and z that bfloat16 holds while float16 holds s and z - 8 s, GGUF's minimum.

    bfloat16 has 8 bits and float16 has 11 down to 2^-24. Where |z| < 100 |s| one rounding of each is enough.
    """
    scale = scale.half().bfloat16().float()
    least = (offset + LOW * scale).half().float()
    return scale, (least - LOW * scale).bfloat16().float()


def search(
    wide: Tensor, importance: Tensor | None = None, shrinks: Sequence[float] = SHRINKS, rounds: int = 1
) -> tuple[Tensor, Tensor]:
    """Scales and offsets of little error sum_i k_i (w_i - q_i s - z)^2 for the nearest q, among what `storable` gives.

    A symmetric grid from the value furthest from 0, as GGUF's Q4_0 has it, and several shares of the group's span
    are tried; each is improved by the least squares for its q.

    Args:
        wide: (..., group) w, float32.
        importance: k, broadcast against it; 1 unless given.
        shrinks: the shares.
        rounds: of least squares.

    Returns:
        s and z (..., 1). A group that holds no number gets no number.
    """
    low, high = wide.aminmax(dim=-1, keepdim=True)
    extreme = torch.where(high.abs() > low.abs(), high, low)
    candidates = [(extreme / LOW, torch.zeros_like(low))]
    for shrink in shrinks:
        scale = (high - low) * shrink / (HIGH - LOW)
        candidates.append((scale, (high + low + scale) / 2))
    best = torch.full_like(low, torch.inf)
    found = torch.ones_like(low), torch.full_like(low, torch.nan)
    for candidate in candidates:
        scale, offset, steps = _nearest(wide, *candidate)
        for left in reversed(range(rounds + 1)):
            squares = torch.addcmul(offset, steps, scale).sub_(wide).square_()
            error = (squares if importance is None else squares.mul_(importance)).sum(-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            found = torch.where(better, scale, found[0]), torch.where(better, offset, found[1])
            if left:
                scale, offset, steps = _nearest(wide, *_least_squares(wide, steps, importance))
    return found


def _nearest(wide: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The grid as it can be stored, and q."""
    scale, offset = storable(torch.where(scale.half() == 0, LEAST, scale), offset)
    return scale, offset, ((wide - offset) / scale).round_().clamp_(LOW, HIGH)


def _least_squares(wide: Tensor, steps: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The s and z of least squared error for given q: a straight line through (q, w)."""
    share = torch.ones(wide.shape[-1]) if importance is None else importance
    share = share / share.sum(-1, keepdim=True)
    mean_q, mean_w = ((share * numbers).sum(-1, keepdim=True) for numbers in (steps, wide))
    centred = steps - mean_q
    spread = (share * centred.square()).sum(-1, keepdim=True)
    slope = (share * centred * (wide - mean_w)).sum(-1, keepdim=True) / spread
    slope = torch.where((spread == 0) | (slope == 0), torch.ones_like(slope), slope)
    return slope, mean_w - slope * mean_q
