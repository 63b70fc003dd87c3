"""Softmax gradient of the cross-entropy loss in bfloat16 on the CPU (`softmax.cpp`)."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from minillama.layers.cross_entropy import softmax_grad
from minillama.model import Decoder
from minillama.native.build import Kernel


def native_softmax_grad(logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Softmax gradient in C++ if supported (bfloat16, CPU, one target per row, no z-loss), else `softmax_grad`."""
    kinds = logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and targets.dtype == torch.int64
    if z_loss or not kinds or not logits.is_contiguous() or targets.shape != (len(logits), 1):
        return softmax_grad(logits, targets, weights, z_loss)
    rows, width = logits.shape
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < width:
        raise IndexError(f"target ids outside a vocabulary of {width}")
    targets = targets.contiguous()
    losses, sums = (logits.new_empty(rows, 1, dtype=torch.float32) for _ in range(2))
    sizes = c_int64(rows), c_int64(width), c_int32(torch.get_num_threads())
    KERNEL.library().minillama_softmax_grad(*sizes, *(c_void_p(x.data_ptr()) for x in (logits, targets, losses, sums)))
    return (losses * weights).sum(), sums


KERNEL = Kernel("softmax.cpp", "avx512_bf16", Decoder, "loss_kernel", native_softmax_grad)
