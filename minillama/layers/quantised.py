"""Products with weights of one byte or half a byte, as torch's packed kernels take them.

The kernels are vectorised for bfloat16 inputs alone: float32 ones are cast before and the result after, since the
float32 kernel is ten times slower (benchmarks/README.md). Scales of int8 stay in float32, outside of the kernel.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GROUP", "Int4Linear", "Int8Linear", "Quantisation", "int4_groups", "int8_rows"]

Quantisation = Literal["none", "int8", "int4"]
GROUP = 32
CHUNK = 2**17  # weights whose grids are searched at once, so that they stay in the cache
ROWS = 32  # from so many rows on unpacking the weights once and multiplying as usual is faster


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers q and scales s of x = q s, one scale a row, s = max |x| / 127 over the last dimension.

    Args:
        x: (..., I); of a weight (O, I) a row is an output channel.

    Returns:
        q (..., I) int8 and s (..., 1) float32.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale).round().to(torch.int8), scale


def int4_groups(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers q, scales s and offsets z of w = (q - 8) s + z, q in 0..15, one s and z for `group` inputs.

    For a range of s a share of the group's span, s and z are tried; the pair of the least squared error is taken,
    sum_i (w_i - (q_i - 8) s - z)^2. The range contains the symmetric grid of GGUF's Q4_0, so that
    weights which come from there keep their steps.

    Args:
        weight: (O, I), I a multiple of `group`.
        group: inputs that share a scale.

    Returns:
        q (O, I) int32, s and z (O, I / group) float32.
    """
    rows = max(1, CHUNK // weight.shape[1])
    parts = [_groups(part.float().unflatten(-1, (-1, group))) for part in weight.split(rows)]
    q, s, z = (torch.cat(found) for found in zip(*parts, strict=True))
    return (q + 8).int().flatten(-2), s.squeeze(-1), z.squeeze(-1)


def _groups(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`int4_groups` of (rows, groups, group)."""
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    extreme = torch.where(high.abs() > low.abs(), high, low)
    candidates = [(extreme / -8, torch.zeros_like(low))]  # Q4_0's grid
    for shrink in (1.0, 0.9, 0.8):
        middle = (high + low) / 2
        scale = (high - low) * shrink / 15
        candidates.append((scale, middle + scale / 2))
    best = torch.full_like(low, torch.inf)
    q, s, z = torch.zeros_like(wide), torch.zeros_like(low), torch.full_like(low, torch.nan)
    for scale, offset in candidates:
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        steps = ((wide - offset) / scale).round().clamp(-8, 7)
        for _ in range(2):  # least squares of the grid for these steps, and the steps of that grid
            error = (steps * scale + offset - wide).square().sum(-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            q, s, z = torch.where(better, steps, q), torch.where(better, scale, s), torch.where(better, offset, z)
            scale, offset = _least_squares(wide, steps)
            steps = ((wide - offset) / scale).round().clamp(-8, 7)
    return q, s, z


def _least_squares(wide: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The s and z of least squared error for given steps: a straight line through (steps, w)."""
    mean_q, mean_w = steps.mean(-1, keepdim=True), wide.mean(-1, keepdim=True)
    spread = (steps - mean_q).square().sum(-1, keepdim=True)
    slope = ((steps - mean_q) * (wide - mean_w)).sum(-1, keepdim=True) / spread
    slope = torch.where((spread == 0) | (slope == 0), torch.ones_like(slope), slope)
    return slope, mean_w - slope * mean_q


class Int8Linear(nn.Module):
    """y = (x q^T) s + b with the numbers of `int8_rows`.

    Args:
        linear: the product to replace; its type is that of the inputs.

    Raises:
        ValueError: the number of inputs is no multiple of 32, which torch's kernel wants.
    """

    quantised: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.in_features % 32:
            raise ValueError(f"{linear.in_features} inputs are no multiple of 32")
        self.out_features = linear.out_features
        q, scale = int8_rows(linear.weight.detach())
        self.register_buffer("quantised", q)
        self.register_buffer("scale", scale.squeeze(-1))
        self.dtype = linear.weight.dtype
        self.register_buffer("unit", torch.ones(len(q), dtype=torch.bfloat16, device=q.device))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """(O, I), what the product multiplies with, in the inputs' type."""
        return (self.quantised * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        flat = x.flatten(0, -2)
        if x.dtype == torch.float16:  # sums of whole numbers would leave its range
            return F.linear(x, self.weight, self.bias)
        if len(flat) >= ROWS or x.device.type != "cpu":
            steps = F.linear(flat, self.quantised.to(x.dtype))
        else:
            steps = torch._weight_int8pack_mm(flat.bfloat16().contiguous(), self.quantised, self.unit)
        y = (steps * self.scale).to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """y = x ((q - 8) s + z)^T + b with the numbers of `int4_groups`, on a CPU.

    Args:
        linear: the product to replace; its type is that of the inputs.
        group: inputs that share a scale: 32, 64 or 128.

    Raises:
        ValueError: inputs that are no multiple of `group`, or outputs that are none of 16.
    """

    nibbles: Tensor
    grid: Tensor

    def __init__(self, linear: nn.Linear, group: int = GROUP) -> None:
        super().__init__()
        if linear.in_features % group or linear.out_features % 16:
            raise ValueError(f"{linear.in_features} inputs, {linear.out_features} outputs: no multiples of {group}, 16")
        self.in_features, self.out_features, self.group = linear.in_features, linear.out_features, group
        q, scale, offset = int4_groups(linear.weight.detach(), group)
        low, high = q.to(torch.uint8).unflatten(-1, (-1, 2, 16)).unbind(-2)
        self.register_buffer("nibbles", (low | high << 4).flatten(-2))  # (O, I / 2), in the order of GGUF's Q4_0
        grid = torch.stack((scale, offset), dim=-1).transpose(0, 1).contiguous()  # (I / group, O, 2)
        self.register_buffer("grid", grid.bfloat16())
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        """(O, I), what the product multiplies with, in the inputs' type."""
        made = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        grids = self.grid.transpose(0, 1).float().unsqueeze(-1)
        rows = max(1, CHUNK // self.in_features)
        for part, nibbles, grid in zip(made.split(rows), self.nibbles.split(rows), grids.split(rows), strict=True):
            scale, offset = grid.unbind(-2)  # (rows, I / group, 1)
            steps = _steps(nibbles).view(len(nibbles), -1, self.group).float().sub_(8)
            part.copy_(torch.addcmul(offset, steps, scale).flatten(-2))
        return made

    @cached_property
    def packed(self) -> Tensor:
        """The same numbers in the order of torch's kernel, made when a few rows want it."""
        return torch._convert_weight_to_int4pack_for_cpu(_steps(self.nibbles).int(), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        flat = x.flatten(0, -2)
        if len(flat) >= ROWS:
            return F.linear(x, self.weight, self.bias)
        y = torch._weight_int4pack_mm_for_cpu(flat.bfloat16().contiguous(), self.packed, self.group, self.grid)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def _steps(nibbles: Tensor) -> Tensor:
    """(O, I / 2) -> q (O, I), uint8."""
    pairs = nibbles.unflatten(-1, (-1, 16))
    return torch.stack((pairs & 15, pairs >> 4), dim=-2).flatten(-3)
