"""The loss's softmax in C++ against torch's: values, gradients, what it leaves to torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.layers.cross_entropy import cross_entropy, linear_cross_entropy, softmax_grad
from minillama.model import Decoder
from minillama.native import build, softmax
from minillama.native.softmax import native_softmax_grad

KERNELS, UNITS, EMULATED = softmax, ("avx512_bf16",), ("vectors",)
pytestmark = [
    pytest.mark.skipif(not build.can_build(), reason="no C++ compiler, or not Linux"),
    pytest.mark.usefixtures("kernels"),
]


def scores(rows: int, width: int, scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in bfloat16, targets and weights."""
    generator = torch.Generator().manual_seed(width)
    logits = (torch.randn(rows, width, generator=generator) * scale).bfloat16()
    return logits, torch.randint(0, width, (rows, 1), generator=generator), torch.rand(rows, 1, generator=generator)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 16), (5, 37), (2, 2048), (7, 1003)])
@pytest.mark.parametrize("scale", [0.1, 4.0, 60.0])
def test_it_is_softmax_errors(rows: int, width: int, scale: float) -> None:
    logits, targets, weights = scores(rows, width, scale)
    theirs, ours = logits.clone(), logits.clone()
    expected, expected_sums = softmax_grad(theirs, targets, weights, 0.0)
    found, sums = native_softmax_grad(ours, targets, weights, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=0)
    # a step of bfloat16 where rounding goes the other way; below 2^-126 is nothing
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=1e-37)
    assert ((ours != theirs) & (theirs.abs() > 1e-37)).float().mean() < 0.01


def test_the_whole_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 64, generator=generator).bfloat16().requires_grad_()
    matrix = (torch.randn(501, 64, generator=generator) * 0.3).bfloat16().requires_grad_()
    targets = torch.randint(0, 501, (40,), generator=generator)
    exact = cross_entropy(hidden.double() @ matrix.double().T, targets)
    expected = torch.autograd.grad(exact, (hidden, matrix))
    found = linear_cross_entropy(hidden, matrix, targets, kernel=native_softmax_grad)
    assert abs(found - exact) < 2e-3 * exact
    for one, two in zip(torch.autograd.grad(found, (hidden, matrix)), expected, strict=True):
        assert (one.float() - two.float()).norm() < 0.01 * two.float().norm()


def test_any_number_of_threads_gives_the_same() -> None:
    logits, targets, weights = scores(37, 300)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        mine = logits.clone()
        found.append((mine, *native_softmax_grad(mine, targets, weights, 0.0)))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for other in found[1:] for one, two in zip(found[0], other, strict=True))


def test_numbers_that_are_none_are_not_hidden() -> None:
    logits, targets, weights = scores(3, 50)
    logits[1, 7] = float("nan")
    found, sums = native_softmax_grad(logits, targets, weights, 0.0)
    assert found.isnan()
    assert sums[:, 0].isnan().tolist() == [False, True, False]


def test_a_token_that_cannot_be() -> None:
    logits, targets, weights = scores(2, 50)
    logits[:, 3:9] = -torch.inf
    targets[:] = 20
    found, _ = native_softmax_grad(logits.clone(), targets, weights, 0.0)
    torch.testing.assert_close(found, softmax_grad(logits, targets, weights, 0.0)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_that_is_no_id_is_refused(target: int) -> None:
    logits, targets, weights = scores(2, 50)
    targets[1] = target
    with pytest.raises(IndexError, match="50"):
        native_softmax_grad(logits, targets, weights, 0.0)


def test_the_rest_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax.KERNEL, "library", lambda: pytest.fail("taken"))
    logits, targets, weights = scores(4, 50)
    apart = torch.cat([logits, logits], 1)[:, :50]
    for given, ids, z_loss in (
        (logits.float(), targets, 0.0),
        (logits.clone(), targets, 0.1),
        (apart, targets, 0.0),
        (logits.clone(), targets.int(), 0.0),
    ):
        assert native_softmax_grad(given, ids, weights, z_loss)[0] > 0
    with pytest.raises(RuntimeError):  # torch says that shapes do not agree
        native_softmax_grad(logits, targets[:2], weights, 0.0)


def test_a_model_takes_it() -> None:
    model = Decoder(ModelConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=64, max_seq_len=8)).bfloat16()
    hidden, targets = torch.randn(2, 8, 32).bfloat16(), torch.randint(0, 64, (2, 8))
    before = model.loss(hidden, targets)
    softmax.KERNEL.use(model)
    assert model.loss_kernel is native_softmax_grad
    torch.testing.assert_close(model.loss(hidden, targets), before, rtol=1e-5, atol=1e-5)
