"""Products with weights of one byte or half a byte, as torch's packed kernels take them.

The kernels are vectorized for bfloat16 inputs alone: float32 ones are cast before and the result after, since the
float32 kernel is ten times slower (benchmarks/README.md). Scales of int8 stay in float32, outside of the kernel.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillama.layers.int4 import GROUP, Int4

__all__ = ["Int4Linear", "Int8Linear", "Quantization", "int8_rows", "takes_int4"]

Quantization = Literal["none", "int8", "int4"]
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


def takes_int4(linear: nn.Linear, group: int = GROUP) -> bool:
    """Whether a product has a shape that `Int4Linear` takes."""
    return linear.in_features % group == 0 and linear.out_features % 16 == 0


class Int8Linear(nn.Module):
    """y = (x q^T) s + b with the numbers of `int8_rows`.

    Args:
        linear: the product to replace; its type is that of the inputs.

    Raises:
        ValueError: the number of inputs is no multiple of 32, which torch's kernel wants.
    """

    quantized: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.in_features % 32:
            raise ValueError(f"{linear.in_features} inputs are no multiple of 32")
        self.out_features = linear.out_features
        q, scale = int8_rows(linear.weight.detach())
        self.register_buffer("quantized", q)
        self.register_buffer("scale", scale.squeeze(-1))
        self.dtype = linear.weight.dtype
        self.register_buffer("unit", torch.ones(len(q), dtype=torch.bfloat16, device=q.device))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """(O, I), what the product multiplies with, in the inputs' type."""
        return (self.quantized * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        flat = x.flatten(0, -2)
        if x.dtype == torch.float16:  # sums of whole numbers would leave its range
            return F.linear(x, self.weight, self.bias)
        if len(flat) >= ROWS or x.device.type != "cpu":
            steps = F.linear(flat, self.quantized.to(x.dtype))
        else:
            steps = torch._weight_int8pack_mm(flat.bfloat16().contiguous(), self.quantized, self.unit)
        y = (steps * self.scale).to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """y = x (q s + z)^T + b with the numbers of `Int4`, on a CPU. The grid is kept in bfloat16.

    Args:
        numbers: of the matrix (O, I), in groups of 32, 64 or 128.
        bias: (O,), or None.
        dtype: of the inputs.

    Raises:
        ValueError: outputs that are no multiple of 16, which torch's kernel wants.
    """

    nibbles: Tensor
    grid: Tensor

    def __init__(self, numbers: Int4, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.out_features, self.in_features = len(numbers.nibbles), numbers.nibbles.shape[1] * 2
        if self.out_features % 16:
            raise ValueError(f"{self.out_features} outputs are no multiple of 16")
        self.group = numbers.group
        self.register_buffer("nibbles", numbers.nibbles.contiguous())
        grid = torch.stack((numbers.scale, numbers.offset), dim=-1).transpose(0, 1).contiguous()  # (I / group, O, 2)
        self.register_buffer("grid", grid.bfloat16())
        self.bias = bias
        self.dtype = dtype

    @classmethod
    def of(cls, linear: nn.Linear, group: int = GROUP, importance: Tensor | None = None) -> Int4Linear:
        """In the place of a product, with the numbers that `Int4.of` finds."""
        return cls(Int4.of(linear.weight.detach(), group, importance), linear.bias, linear.weight.dtype)

    @property
    def numbers(self) -> Int4:
        """What the product multiplies with."""
        scale, offset = self.grid.float().transpose(0, 1).unbind(-1)
        return Int4(self.nibbles, scale, offset)

    @property
    def weight(self) -> Tensor:
        """(O, I), the numbers multiplied out, in the inputs' type."""
        return self.numbers.weight(self.dtype)

    @cached_property
    def packed(self) -> Tensor:
        """The same numbers in the order of torch's kernel, made when a few rows want it."""
        return torch._convert_weight_to_int4pack_for_cpu(self.numbers.unsigned.int(), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        flat = x.flatten(0, -2)
        if len(flat) >= ROWS:
            return F.linear(x, self.weight, self.bias)
        y = torch._weight_int4pack_mm_for_cpu(flat.bfloat16().contiguous(), self.packed, self.group, self.grid)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
