"""A model with parts in C++ beside its twin without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from minillama.model import Decoder


@pytest.fixture
def same_training() -> Callable[[Decoder, Decoder], None]:
    """Asserts that loss and gradients of a model in bfloat16 are those of its twin, of 64 tokens, to its precision."""

    def compare(plain: Decoder, native: Decoder) -> None:
        tokens = torch.randint(0, 64, (3, 71), generator=torch.Generator().manual_seed(7))
        losses = [model.loss(model.hidden(tokens[:, :-1]), tokens[:, 1:]) for model in (plain, native)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=0)
        for (name, one), two in zip(plain.named_parameters(), native.parameters(), strict=True):
            assert one.grad is not None and two.grad is not None
            assert (two.grad - one.grad).norm() < 0.03 * one.grad.norm(), name

    return compare
