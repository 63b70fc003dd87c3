"""The blocked kernel against torch's, and the choice between them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from minillama.layers.attend import attend, blocked_causal
from minillama.layers.mask import KernelMask


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("length", [1, 7, 8, 21])
def test_blocked_equals_fused_with_gradients(kv_heads: int, length: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, length, 10, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, length, 10, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 6, length, 10)
    results = []
    for out in (
        blocked_causal(q, k, v, block=8),
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    ):
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_bfloat16_on_the_cpu_is_as_exact_as_the_fused_kernel() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 300, 16) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    half = [t.bfloat16() for t in (q, k, v)]
    ours = (attend(*half, KernelMask(None, True)).float() - exact).abs().mean()
    fused = (F.scaled_dot_product_attention(*half, is_causal=True).float() - exact).abs().mean()
    assert ours < 1.5 * fused


@pytest.mark.parametrize(("long", "growth"), [(64, (1.9, 2.1)), (1024, (2.9, 4.1))])
def test_beyond_long_what_is_kept_grows_with_the_length(
    long: int, growth: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillama.layers.attend.LONG", long)

    def kept(length: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        q, k, v = (torch.randn(1, 2, length, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = attend(q, k, v, KernelMask(None, True))
        assert out.requires_grad
        return sum(sizes.values())

    assert growth[0] < kept(512) / kept(256) < growth[1]
