"""Int4 weights chosen by what they do to a text: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

Of each product W with inputs X the error is |(W - W') X|^2 = tr((W - W') H (W - W')^T), H = X X^T. Columns are rounded
one after the other, and what rounding one has cost is made good as well as it can be by those that are still to come.
Layers are taken in order, each with the inputs that the quantised ones before it give.

Shapes: N texts, T tokens, D width, I inputs and O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from minillama.layers.int4 import GROUP, HIGH, LOW, Int4, search
from minillama.layers.quantised import Int4Linear, takes_int4
from minillama.model import Decoder
from minillama.products import products
from minillama.state import Span

__all__ = ["calibrate", "gptq"]

DAMPING = 0.1  # of the mean of the Hessian's diagonal
SHRINKS = tuple(1.05 - 0.05 * i for i in range(12))  # more than a search at loading tries
ROUNDS = 3
TOKENS = 4096  # that a block reads at once


class _Reached(Exception):
    """The product whose inputs are wanted has been called."""


@torch.no_grad()
def calibrate(model: Decoder, ids: Tensor, group: int = GROUP) -> None:
    """Make the products of a model's blocks int4 in place, the numbers chosen by the inputs that a text gives them.

    In memory are the residual stream (N, T, D) and one Hessian. A block is run up to each of its products of another
    input, and once to its end.

    Args:
        model: a decoder on a CPU, faster after `fuse`.
        ids: (N, T) of a text.
        group: inputs that share a grid.
    """
    span = Span(0, ids.shape[1], ids.shape[1])
    x, rope, mask = model.enter(ids, span)
    parts = x.split(max(1, TOKENS // ids.shape[1]))
    wanted = {
        product.module: product
        for product in products(model)
        if isinstance(product.module, nn.Linear) and takes_int4(product.module, group)
    }
    for block in model.blocks:
        run = partial(block, rope=rope, mask=mask, span=span)
        for together in _by_input([part for part in block.modules() if part in wanted], partial(run, parts[0][:1])):
            hessian = _hessian(together[0], parts, run)
            for linear in together:
                found = gptq(linear.weight, hessian, group)
                wanted[linear].replace(Int4Linear(found, linear.bias, linear.weight.dtype))
        for part in parts:
            part.copy_(run(part))


def _by_input(linears: list[nn.Module], run: Callable[[], Tensor]) -> list[list[nn.Linear]]:
    """Products in the order in which they are called, those of one input together."""
    inputs: list[Tensor] = []
    groups: list[list[nn.Linear]] = []

    def called(linear: nn.Module, args: tuple[Tensor]) -> None:
        if not inputs or args[0] is not inputs[-1]:
            inputs.append(args[0])
            groups.append([])
        groups[-1].append(cast(nn.Linear, linear))

    handles = [linear.register_forward_pre_hook(called) for linear in linears]
    run()
    for handle in handles:
        handle.remove()
    return groups


def _hessian(linear: nn.Linear, parts: Sequence[Tensor], run: Callable[[Tensor], Tensor]) -> Tensor:
    """(I, I), the sum of x x^T over the inputs x that a product gets."""
    total = torch.zeros(linear.in_features, linear.in_features)

    def called(_: nn.Module, args: tuple[Tensor]) -> None:
        inputs = args[0].flatten(0, -2).float()
        total.addmm_(inputs.T, inputs)
        raise _Reached

    handle = linear.register_forward_pre_hook(called)
    for part in parts:
        with suppress(_Reached):
            run(part)
    handle.remove()
    return total


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, group: int = GROUP, damping: float = DAMPING) -> Int4:
    """Numbers q, s, z of little error tr((W - W') H (W - W')^T).

    With U^T U the Cholesky factors of H^-1, column i is rounded to w'_i, and (w_i - w'_i) / U_ii U_ij is taken from
    every later column j (§3.3, step 3). A group's grid is searched when its first column is reached, squared errors
    weighted by the diagonal of H, and is rounded before anything is compensated for.

    Args:
        weight: (O, I).
        hessian: (I, I), sum of x x^T over tokens.
        group: inputs that share a grid.
        damping: added to the diagonal, as a share of its mean.
    """
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    diagonal += damping * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    importance = diagonal.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left = weight.float().T.contiguous()  # (I, O), so that a column of W lies together
    steps, grids = torch.empty_like(left), []
    for at in range(0, len(left), group):
        end = at + group
        scale, offset = (grid.squeeze(-1) for grid in search(left[at:end].T, importance[at:end], SHRINKS, ROUNDS))
        grids.append((scale, offset))
        errors = torch.empty_like(left[at:end])
        for i in range(at, end):
            torch.round((left[i] - offset) / scale, out=steps[i]).clamp_(LOW, HIGH)
            error = torch.div(left[i] - torch.addcmul(offset, steps[i], scale), factor[i, i], out=errors[i - at])
            left[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[at:end, end:].T, errors, alpha=-1)
    scale, offset = (torch.stack(found, dim=1) for found in zip(*grids, strict=True))
    return Int4.packed(steps.T, scale, offset)
