"""Coordinate check of a parametrization: change of activations over width in the first steps of training.

Yang et al. 2022, arXiv 2203.03466, App. D.1: under muP the mean absolute change of every activation is the same for
all widths; in the standard parametrization it grows with the width, and with it the loss of a learning rate that is
right for another width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minillama.model import Decoder
from minillama.runs.config import RunConfig
from minillama.training.optim.groups import make_optimizers

PARTS = ("self_attn", "mlp")


def changes(config: RunConfig, rows: Sequence[Tensor], seed: int = 0) -> dict[str, float]:
    """Mean absolute change of activations from initialization, after one step per batch at a constant rate.

    Args:
        config: model and optimizer; float32, whatever its dtype.
        rows: batches of ids (B, T + 1); activations are those of the first.
        seed: of the initialization.

    Returns:
        By activation: self_attn and mlp (outputs, averaged over the layers), hidden (the final norm's output), logits.
    """
    model = Decoder(config.model)
    model.init_weights(torch.Generator().manual_seed(seed), config.mup)
    optimizers = make_optimizers(model, config.optim, config.mup)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * group["lr_scale"]
    before = _activations(model, rows[0][:, :-1])
    for ids in rows:
        (model.loss(model.hidden(ids[:, :-1]), ids[:, 1:]) / ids[:, 1:].numel()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    after = _activations(model, rows[0][:, :-1])
    return {name: (after[name] - before[name]).abs().mean().item() for name in after}


@torch.no_grad()
def _activations(model: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}

    def keep(part: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[part].append(output)

    hook: Callable[[str], Any] = partial(partial, keep)
    handles = [getattr(block, part).register_forward_hook(hook(part)) for block in model.blocks for part in PARTS]
    hidden = model.hidden(tokens)
    for handle in handles:
        handle.remove()
    return {part: torch.stack(outputs) for part, outputs in found.items()} | {
        "hidden": hidden,
        "logits": model.head(hidden),
    }


def slope(widths: Sequence[float], values: Sequence[float]) -> float:
    """Exponent s of values ~ width^s, by least squares of the logarithms."""
    x, y = [math.log(width) for width in widths], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)
