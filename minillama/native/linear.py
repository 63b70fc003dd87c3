"""Linear layers in float32 by AMX (`linear.cpp`), for passes over many tokens without gradients."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int32, c_void_p

import torch
from torch import Tensor, nn

from minillama.errors import InputError
from minillama.model import Decoder
from minillama.model.linears import linears
from minillama.native.build import CannotBuild, Kernel, can_build

DEPTH = 32  # divisor of both widths
PARTS = 2  # as in linear.cpp


class SplitLinear(nn.Module):
    """Linear layer y = x W^T + b in float32, operands rounded to two bfloat16 parts; frozen, about twice as fast.

    Two parts have 17 significant bits; their products are exact and added up in float32, all but those of two second
    parts. The relative error of y is about 5e-6, of a float32 product 3e-7, of a bfloat16 one 3e-3.

    Args:
        linear: float32 layer on a CPU, both widths multiples of 32; not kept.

    Raises:
        InputError: from `forward`, where a gradient is asked for.
    """

    bias: Tensor | None
    packed: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().contiguous()
        self.out_features, self.in_features = weight.shape
        # buffers, by which processes see that they have the same weights
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().contiguous())
        self.register_buffer("packed", torch.empty(PARTS * weight.numel(), dtype=torch.bfloat16))
        sizes = self.out_features, self.in_features, torch.get_num_threads()
        KERNEL.library().minillama_linear_pack(*map(c_int32, sizes), *_pointers(weight, self.packed))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., M)."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError(
                "a split linear layer has no gradient", fix="torch.no_grad(), or another copy of the model"
            )
        rows = x.reshape(-1, self.in_features).contiguous()
        padded = -(-len(rows) // DEPTH) * DEPTH
        work = torch.empty(PARTS * padded * self.in_features, dtype=torch.bfloat16)
        y = torch.empty(len(rows), self.out_features)
        sizes = len(rows), self.out_features, self.in_features, torch.get_num_threads()
        KERNEL.library().minillama_linear(*map(c_int32, sizes), *_pointers(rows, self.packed, self.bias, work, y))
        return y.view(*x.shape[:-1], self.out_features)


def _pointers(*tensors: Tensor | None) -> list[c_void_p]:
    return [c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


KERNEL = Kernel("linear.cpp", "amx_bf16", nn.Linear, "", SplitLinear)  # layers are replaced, and none is switched


def use_split_linears(model: Decoder, say: Callable[[str], None] = lambda text: None) -> None:
    """Replace linear layers and head of a float32 model on a CPU with AMX, in place and for good; others stay.

    Args:
        model: that reads many tokens at a time; it takes no gradients and is not saved.
        say: called before compilation, and with the reason where that fails.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32 or KERNEL.unsupported() or not can_build():
        return
    try:
        KERNEL.library(say)
    except CannotBuild as error:
        say(f"C++ for linear layers was not compiled, evaluation goes on without: {error}")
        return
    for name, layer in linears(model).items():
        if type(layer) is nn.Linear and not any(width % DEPTH for width in layer.weight.shape):
            model.set_submodule(name, SplitLinear(layer))
    if model.score is None and not any(width % DEPTH for width in model.output_weight.shape):
        outputs, width = model.output_weight.shape
        head = nn.Linear(width, outputs, bias=False, device="meta")
        head.weight = nn.Parameter(model.output_weight.detach(), requires_grad=False)
        del model.lm_head
        model.add_module("lm_head", SplitLinear(head))
