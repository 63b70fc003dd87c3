"""The loss without the logits: value and gradients of the plain one, whatever the chunks."""

from __future__ import annotations

import pytest
import torch

from minillama.errors import InputError
from minillama.layers import cross_entropy as module
from minillama.layers.cross_entropy import cross_entropy, linear_cross_entropy


def parts(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 7, 12, generator=generator).to(dtype).requires_grad_()
    matrix = torch.randn(29, 12, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 29, (2, 7), generator=generator)
    return hidden, matrix, targets, torch.rand(2, 7, generator=generator)


@pytest.mark.parametrize("rows", [1, 4, 512])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [True, False])
def test_value_and_gradients(rows: int, z_loss: float, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "loss_rows", lambda *sizes: rows)
    hidden, matrix, targets, weights = parts(torch.float32)
    shares = weights if weighted else None
    plain = cross_entropy(hidden @ matrix.T, targets, shares, z_loss)
    expected = torch.autograd.grad(plain * 0.37, (hidden, matrix))
    loss = linear_cross_entropy(hidden, matrix, targets, shares, z_loss)
    found = torch.autograd.grad(loss * 0.37, (hidden, matrix))
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bfloat16_to_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "loss_rows", lambda *sizes: 4)
    hidden, matrix, targets, weights = parts(torch.bfloat16)
    loss = linear_cross_entropy(hidden, matrix, targets, weights)
    found = torch.autograd.grad(loss, (hidden, matrix))
    assert loss.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in found)
    exact_hidden, exact_matrix = (t.detach().double().requires_grad_() for t in (hidden, matrix))
    exact = cross_entropy((exact_hidden @ exact_matrix.T), targets, weights)
    expected = torch.autograd.grad(exact, (exact_hidden, exact_matrix))
    assert abs(loss - exact) / exact < 1e-2
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-2


def test_a_frozen_head_and_a_frozen_body(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, matrix, targets, _ = parts(torch.float32)
    expected = torch.autograd.grad(cross_entropy(hidden @ matrix.T, targets), (hidden, matrix))
    for trained, frozen in ((0, 1), (1, 0)):
        pair = [hidden, matrix]
        pair[frozen] = pair[frozen].detach()
        (found,) = torch.autograd.grad(linear_cross_entropy(*pair, targets), pair[trained])
        torch.testing.assert_close(found, expected[trained], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        plain = cross_entropy(hidden @ matrix.T, targets)
        torch.testing.assert_close(linear_cross_entropy(hidden, matrix, targets), plain)


def test_the_logits_are_never_there_as_a_whole() -> None:
    hidden, matrix = torch.randn(4096, 16, requires_grad=True), torch.randn(20_000, 16, requires_grad=True)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, matrix, torch.zeros(4096, dtype=torch.long)).backward()
    assert max(sizes) <= 4096 * 20_000 / 3 + 20_000


def test_second_derivatives_are_refused() -> None:
    hidden, matrix = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, matrix, torch.tensor([1, 0, 4]))
    with pytest.raises(InputError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
