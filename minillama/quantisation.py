"""Weights of one byte or half a byte for decoding: which products take them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from minillama.errors import InputError
from minillama.layers.quantised import GROUP, Int4Linear, Int8Linear, Quantisation
from minillama.model import Decoder

__all__ = ["quantise"]


@torch.no_grad()
def quantise(model: Decoder, kind: Quantisation, group: int = GROUP) -> Decoder:
    """Replace the products of a model in place; there is no way back, and a quantised model is not saved.

    The head takes int8 in both kinds, a copy where it is tied: its errors are the largest in the logits, which is
    also why GGUF's four-bit files keep more bits there. Embeddings and norms stay as they are, and so does a product
    whose shape the kernels do not take.

    Args:
        model: a decoder, best after `fuse`.
        kind: int8, one scale an output channel, or int4, one scale and offset a group of inputs.
        group: of int4: 32, 64 or 128.

    Raises:
        InputError: int4 elsewhere than on a CPU.
    """
    if kind == "none":
        return model
    if kind == "int4" and model.device.type != "cpu":
        raise InputError("int4 products run on a CPU alone", where="--quantize", found="int4", fix="take int8")
    model.step = None  # it has the old weights
    for block in model.blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, _quantised(child, kind, group))
    head = nn.Linear(model.config.dim, model.config.vocab_size, bias=False, device="meta")
    head.weight = nn.Parameter(model.output_weight.detach(), requires_grad=False)
    model.lm_head = cast(Any, _quantised(head, "int8", group))
    return model


def _quantised(linear: nn.Linear, kind: Quantisation, group: int) -> nn.Module:
    if kind == "int4" and linear.in_features % group == 0 and linear.out_features % 16 == 0:
        return Int4Linear(linear, group)
    return Int8Linear(linear) if linear.in_features % 32 == 0 else linear
