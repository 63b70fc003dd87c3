"""Group-wise asymmetric int4 quantization (scale, zero point), and the search for both.

Scale and zero point are rounded before the integers are chosen, to values that bfloat16 (the kernels here) and float16
(GGUF's Q4_1) both represent, so that a file and a linear layer have bit-identical weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.errors import InputError

GROUP = 32
LOW, HIGH = -8, 7  # range of q
CHUNK = 2**17  # weights processed at once, so that they stay in the cache
LEAST = 2.0**-24  # float16's smallest positive number
SHRINKS = (1.0, 0.9, 0.8)  # candidate fractions of a group's range
MORE = tuple(1.05 - 0.05 * i for i in range(12))  # with an importance matrix


class Int4(NamedTuple):
    """Int4 matrix w = q s + z, q in -8..7, one scale s and zero point z per group of input channels.

    Attributes:
        nibbles: (O, I / 2) uint8. 16 bytes hold 32 input channels as in GGUF: byte j has q + 8 of channel j in its
            low nibble and that of channel j + 16 in its high nibble.
        scale: s, (O, I / group) float32.
        offset: zero point z, (O, I / group) float32.
    """

    nibbles: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def of(cls, weight: Tensor, group: int = GROUP, importance: Tensor | None = None) -> Int4:
        """Quantization of a matrix by `search`, with importance over more candidates.

        Args:
            weight: (O, I), I a multiple of `group`.
            group: group size, a multiple of 32.
            importance: (I,) weights of the squared errors; default 1.

        Raises:
            InputError: finite weights whose scale or zero point exceeds float16; NaN or infinite importance.
        """
        if importance is not None and not importance.isfinite().all():
            raise InputError(
                "the calibration text gives NaN or infinite inputs of a linear layer",
                where="calibration",
                found=f"{(~importance.isfinite()).sum()} of {importance.numel()} inputs",
                fix="check the model, or quantize without calibration",
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
                    "weights too large for int4, whose scales and zero points are float16",
                    found=f"{wide[lost.squeeze(-1)].abs().max():g}",
                    expected="magnitude of at most 65504",
                    fix="use int8",
                )
            steps = ((wide - offset) / scale).round_().clamp_(LOW, HIGH)
            parts.append(cls.packed(steps.flatten(-2), scale.squeeze(-1), offset.squeeze(-1)))
        return cls.stacked(parts)

    @classmethod
    def packed(cls, steps: Tensor, scale: Tensor, offset: Tensor) -> Int4:
        """Pack integers q (O, I) of any dtype, with s and z."""
        low, high = (steps - LOW).to(torch.uint8).unflatten(-1, (-1, 2, 16)).unbind(-2)
        return cls((low | high << 4).flatten(-2), scale, offset)

    @classmethod
    def stacked(cls, parts: Iterable[Int4]) -> Int4:
        """Concatenation of matrices along the output channels."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    @property
    def group(self) -> int:
        """Group size, in input channels."""
        return self.nibbles.shape[1] * 2 // self.scale.shape[1]

    @property
    def unsigned(self) -> Tensor:
        """Unpacked q + 8, (O, I) uint8."""
        pairs = self.nibbles.unflatten(-1, (-1, 16))
        return torch.stack((pairs & 15, pairs >> 4), dim=-2).flatten(-3)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantized weight (O, I), some rows at a time."""
        inputs = self.nibbles.shape[1] * 2
        dequantized = torch.empty(len(self.nibbles), inputs, dtype=dtype)
        rows = max(1, CHUNK // inputs)
        for part, *numbers in zip(dequantized.split(rows), *(tensor.split(rows) for tensor in self), strict=True):
            some = Int4(*numbers)
            steps = some.unsigned.unflatten(-1, (-1, self.group)).float().add_(LOW)
            scale, offset = (grid.float().unsqueeze(-1) for grid in (some.scale, some.offset))
            part.copy_(torch.addcmul(offset, steps, scale).flatten(-2))
        return dequantized

    def rows(self, start: int, end: int) -> Int4:
        """Slice of the rows."""
        return Int4(*(tensor[start:end] for tensor in self))


def storable(scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest s and z that bfloat16 represents while float16 represents s and z - 8 s, GGUF's minimum.

    bfloat16 has 8 significant bits and float16 has 11 down to 2^-24. For |z| < 100 |s| one rounding each is enough.
    """
    scale = scale.half().bfloat16().float()
    least = (offset + LOW * scale).half().float()
    return scale, (least - LOW * scale).bfloat16().float()


def search(
    wide: Tensor, importance: Tensor | None = None, shrinks: Sequence[float] = SHRINKS, rounds: int = 1
) -> tuple[Tensor, Tensor]:
    """Search for storable s and z of small weighted error sum_i k_i (w_i - q_i s - z)^2 with the nearest q.

    Candidates are a symmetric scale from the largest magnitude, as in GGUF's Q4_0, and several fractions of the
    group's range; each is refined by least squares for its q.

    Args:
        wide: (..., group) w, float32.
        importance: k, broadcast against it; default 1.
        shrinks: the fractions.
        rounds: of least squares.

    Returns:
        s and z (..., 1). z is NaN where no candidate has a finite error.
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
    """Storable scale and zero point, and the nearest q."""
    scale, offset = storable(torch.where(scale.half() == 0, LEAST, scale), offset)
    return scale, offset, ((wide - offset) / scale).round_().clamp_(LOW, HIGH)


def _least_squares(wide: Tensor, steps: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least-squares s and z for given q: linear regression of w on q."""
    k = torch.ones(wide.shape[-1]) if importance is None else importance
    k = k / k.sum(-1, keepdim=True)
    mean_q, mean_w = ((k * numbers).sum(-1, keepdim=True) for numbers in (steps, wide))
    centered = steps - mean_q
    spread = (k * centered.square()).sum(-1, keepdim=True)
    slope = (k * centered * (wide - mean_w)).sum(-1, keepdim=True) / spread
    slope = torch.where((spread == 0) | (slope == 0), torch.ones_like(slope), slope)
    return slope, mean_w - slope * mean_q
