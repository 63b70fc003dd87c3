"""Int8 and int4 linear layers on torch's packed kernels.

The kernels are vectorized for bfloat16 inputs only: float32 ones are cast before and the result after, since the
float32 kernel is ten times slower (benchmarks/README.md). Scales of int8 stay in float32, outside of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillama.layers.int4 import CHUNK, GROUP, Int4

Quantization = Literal["none", "int8", "int4"]
ROWS = 32  # from this many rows on dequantizing once and a plain matrix product is faster


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 quantization x = q s, one scale per row, s = max |x| / 127 over the last dimension.

    Args:
        x: (..., I); of a weight (O, I) a row is an output channel.

    Returns:
        q (..., I) int8 and s (..., 1) float32.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale).round().to(torch.int8), scale


def takes_int4(linear: nn.Linear, group: int = GROUP) -> bool:
    """Whether `Int4Linear` supports the shape of a linear layer."""
    return linear.in_features % group == 0 and linear.out_features % 16 == 0


class _FrozenProduct(torch.autograd.Function):
    """Product x W^T with a weight that is dequantized once more in the backward pass instead of kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight(), None


def _trains(x: Tensor) -> bool:
    """Whether a gradient is asked for, which the packed kernels do not have."""
    return torch.is_grad_enabled() and x.requires_grad


class QuantizedLinear(nn.Module):
    """Quantized linear layer; a change of dtype is one of the inputs, and leaves scales and zero points as they are.

    Attributes:
        dtype: of the inputs.
    """

    dtype: torch.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class Int8Linear(QuantizedLinear):
    """Int8 linear layer y = (x q^T) s + b, one scale per output channel.

    Args:
        linear: layer to quantize; its dtype is that of the inputs.

    Raises:
        ValueError: in_features is not a multiple of 32, as torch's kernel requires.
    """

    quantized: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.in_features % 32:
            raise ValueError(f"in_features {linear.in_features} is not a multiple of 32")
        self.out_features = linear.out_features
        rows = linear.weight.detach().split(max(1, CHUNK // linear.in_features))  # of a head all at once are large
        q, scale = (torch.cat(parts) for parts in zip(*map(int8_rows, rows), strict=True))
        self.register_buffer("quantized", q)
        self.register_buffer("scale", scale.squeeze(-1))
        self.dtype = linear.weight.dtype
        self.register_buffer("unit", torch.ones(len(q), dtype=torch.bfloat16, device=q.device))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """Dequantized weight (O, I), in the inputs' dtype."""
        return (self.quantized * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        flat = x.flatten(0, -2)
        if x.dtype == torch.float16:  # integer sums would overflow it
            return F.linear(x, self.weight, self.bias)
        if len(flat) >= ROWS or x.device.type != "cpu" or _trains(x):
            steps: Tensor = _FrozenProduct.apply(flat, lambda: self.quantized.to(x.dtype))
        else:
            steps = torch._weight_int8pack_mm(flat.bfloat16().contiguous(), self.quantized, self.unit)
        y = (steps * self.scale).to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Int4Linear(QuantizedLinear):
    """Int4 linear layer y = x (q s + z)^T + b on a CPU, with scales and zero points in bfloat16.

    Args:
        numbers: quantized weight (O, I), in groups of 32, 64 or 128.
        bias: (O,), or None.
        dtype: of the inputs.

    Raises:
        ValueError: out_features is not a multiple of 16, as torch's kernel requires.
    """

    nibbles: Tensor
    grid: Tensor

    def __init__(self, numbers: Int4, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.out_features, self.in_features = len(numbers.nibbles), numbers.nibbles.shape[1] * 2
        if self.out_features % 16:
            raise ValueError(f"out_features {self.out_features} is not a multiple of 16")
        self.group = numbers.group
        self.register_buffer("nibbles", numbers.nibbles.contiguous())
        grid = torch.stack((numbers.scale, numbers.offset), dim=-1).transpose(0, 1).contiguous()  # (I / group, O, 2)
        self.register_buffer("grid", grid.bfloat16())
        self.bias = bias
        self.dtype = dtype

    @classmethod
    def of(cls, linear: nn.Linear, group: int = GROUP, importance: Tensor | None = None) -> Int4Linear:
        """Quantization of a linear layer by `Int4.of`."""
        return cls(Int4.of(linear.weight.detach(), group, importance), linear.bias, linear.weight.dtype)

    @property
    def numbers(self) -> Int4:
        """Quantized weight."""
        scale, offset = self.grid.float().transpose(0, 1).unbind(-1)
        return Int4(self.nibbles, scale, offset)

    @property
    def weight(self) -> Tensor:
        """Dequantized weight (O, I), in the inputs' dtype."""
        return self.numbers.weight(self.dtype)

    @cached_property
    def packed(self) -> Tensor:
        """Weight in the layout of torch's kernel, packed on first use."""
        return torch._convert_weight_to_int4pack_for_cpu(self.numbers.unsigned.int(), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        flat = x.flatten(0, -2)
        if _trains(x):
            y: Tensor = _FrozenProduct.apply(flat, lambda: self.weight)
        elif len(flat) >= ROWS:
            return F.linear(x, self.weight, self.bias)
        else:
            y = torch._weight_int4pack_mm_for_cpu(flat.bfloat16().contiguous(), self.packed, self.group, self.grid)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
