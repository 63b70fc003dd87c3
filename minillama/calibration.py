"""What a text says of the weights: how much the error of each counts.

An error e_i of the weight of input x_i changes the product by e_i x_i, so that over a text its square counts with the
mean square of x_i. Some inputs are a thousand times as large as others, and a group of weights has one grid: that grid
is chosen for the large ones (the activation-aware scales of AWQ, Lin et al. 2023, arXiv 2306.00978, §3, have the same
ground). GPTQ's compensation of rounding (Frantar et al. 2022, arXiv 2210.17323) on top of it made single products
better and the model worse, see benchmarks/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minillama.model import Decoder
from minillama.products import products

__all__ = ["importances"]

TOKENS = 4096  # that are read at once


@torch.no_grad()
def importances(model: Decoder, ids: Tensor) -> dict[nn.Module, Tensor]:
    """By product of the blocks, the mean square (I,) of each of its inputs over a text, float32.

    Args:
        model: the decoder, before its products are replaced; faster after `fuse`.
        ids: (N, T) of the text.
    """
    found: dict[nn.Module, Tensor] = {}

    def called(product: nn.Module, args: tuple[Tensor]) -> None:
        squares = args[0].flatten(0, -2).float().square().sum(0) / ids.numel()
        found[product] = found[product] + squares if product in found else squares

    handles = [product.module.register_forward_pre_hook(called) for product in products(model)]
    try:
        for part in ids.split(max(1, TOKENS // ids.shape[1])):
            model.hidden(part)
    finally:
        for handle in handles:
            handle.remove()
    return found
