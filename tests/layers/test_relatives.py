"""Known answers of the relatives' layers."""

from __future__ import annotations

import pytest
import torch

from minillama.layers.alibi import slopes
from minillama.layers.wkv import Sums, wkv_scan, wkv_step


@pytest.mark.parametrize(
    ("heads", "places", "expected"),
    [
        (4, [0, 1, 2, 3], [0.25, 0.0625, 0.015625, 0.00390625]),
        (8, [0, 7], [1 / 2, 1 / 256]),
        (12, [7, 8, 9, 10, 11], [1 / 256, 0.70710678, 0.35355339, 0.17677670, 0.08838835]),
        (112, [0, 63, 64, 111], [0.91700404, 0.00390625, 0.95760328, 0.01631678]),
    ],
)
def test_alibis_slopes(heads: int, places: list[int], expected: list[float]) -> None:
    found = slopes(heads)
    assert len(found) == heads
    torch.testing.assert_close(found[places], torch.tensor(expected), atol=1e-7, rtol=1e-6)


def test_gelu_of_one() -> None:
    assert torch.nn.functional.gelu(torch.tensor(1.0), approximate="tanh").item() == pytest.approx(0.8411920, abs=1e-6)


K, V = torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1), torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
W, U = torch.tensor([-1.0]).exp(), torch.tensor([0.3])


def test_wkv_by_hand_all_at_once_and_step_by_step() -> None:
    expected = torch.tensor([1.0, 1.2314752165, 2.7691979275])
    y, sums = wkv_scan(K, V, W, U, Sums.empty(1, 1, torch.device("cpu")))
    torch.testing.assert_close(y.flatten(), expected)
    last = torch.stack([part[0, -1, 0] for part in sums])
    torch.testing.assert_close(last, torch.tensor([3.1758362462, 1.1413736062, 2.0]))
    past, outputs = Sums.empty(1, 1, torch.device("cpu")), []
    for t in range(3):
        out, past = wkv_step(K[:, t], V[:, t], W, U, past)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs).flatten(), expected)
    torch.testing.assert_close(torch.stack([part[0, 0] for part in past]), last)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
def test_the_scan_is_the_recurrence_with_gradients_and_extreme_keys(length: int) -> None:
    torch.manual_seed(length)
    k = (40 * torch.randn(2, length, 5)).requires_grad_()
    v = torch.randn(2, length, 5, requires_grad=True)
    w, u = torch.rand(5) * 3, torch.randn(5)
    past = Sums(torch.randn(2, 5), torch.rand(2, 5), torch.randn(2, 5))
    y, sums = wkv_scan(k, v, w, u, past)
    state, outputs = past, []
    for t in range(length):
        out, state = wkv_step(k[:, t], v[:, t], w, u, state)
        outputs.append(out)
    loop = torch.stack(outputs, 1)
    torch.testing.assert_close(y, loop, atol=1e-4, rtol=1e-4)
    for part, one in zip(sums, state, strict=True):
        torch.testing.assert_close(part[:, -1], one, atol=1e-4, rtol=1e-4)
    weights = torch.randn_like(y)
    found, expected = (torch.autograd.grad((out * weights).sum(), (k, v)) for out in (y, loop))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
