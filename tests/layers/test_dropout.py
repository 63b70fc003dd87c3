"""Dropout: what is dropped, what that leaves of the mean, and one mask for both passes."""

from __future__ import annotations

import pytest
import torch

from minillama.layers.dropout import dropout


@pytest.mark.parametrize("p", [0.15, 0.5, 2**-16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_is_dropped_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.ones(1021, 1023, dtype=dtype, requires_grad=True)
    y = dropout(x, p, training=True)
    y.float().sum().backward()
    zeros = (y == 0).float()
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(zeros.mean().item() - p) < 5 * deviation
    assert y.unique().tolist() == [0, pytest.approx(torch.tensor(1 / (1 - p)).to(dtype).item(), rel=1e-5)]
    assert x.grad is not None and torch.equal(x.grad, y)
    for part in (zeros[:, ::4], zeros[:, 3::4], zeros[1::2]):  # no place has bits of its own
        assert abs(part.mean().item() - p) < 5 * deviation * (x.numel() / part.numel()) ** 0.5
    neighbors = (zeros[:, 1:] * zeros[:, :-1]).mean().item()
    assert abs(neighbors - p * p) < 5 * p / x.numel() ** 0.5


def test_a_seed_makes_the_mask_and_evaluation_none() -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(1))
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(dropout(x, 0.3, training=True))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert dropout(x, 0.3, training=False) is x and dropout(x, 0.0, training=True) is x
    assert not dropout(x, 1.0, training=True).any()


@pytest.mark.slow
def test_compiled_code_draws_one_mask_for_both_passes() -> None:
    compiled = torch.compile(lambda x: dropout(x * 2, 0.3, training=True) + 1)
    x = torch.rand(64, 48) + 1
    x.requires_grad_()
    y = compiled(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (y.detach() - 1) / x.detach(), rtol=1e-4, atol=1e-6)
    torch.manual_seed(5)
    first = compiled(x)
    torch.manual_seed(5)
    plain = dropout(x * 2, 0.3, training=True) + 1
    torch.testing.assert_close(first, plain)
