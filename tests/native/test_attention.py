"""Causal attention in C++ against torch's in float32: values, gradients, what never may be seen, compiled blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.layers.attend import attend
from minillama.layers.mask import KernelMask
from minillama.model import Decoder
from minillama.native import attention, build
from minillama.native.attention import causal_attention, native_attend

KERNELS, UNITS, EMULATED = attention, ("avx512_bf16",), ("tiles", "vectors")
pytestmark = [
    pytest.mark.skipif(not build.can_build(), reason="no C++ compiler, or not Linux"),
    pytest.mark.usefixtures("kernels"),
]
CAUSAL = KernelMask(None, True)


def heads(*shape: int, seed: int = 0) -> Tensor:
    """(B, H, T, E) bfloat16, in memory as (B, T, H, E)."""
    rows, count, tokens, width = shape
    numbers = torch.randn(rows, tokens, count, width, generator=torch.Generator().manual_seed(seed))
    return (numbers * 1.5).bfloat16().transpose(1, 2)


def results(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, dtype: torch.dtype, native: bool) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    if native:
        out = native_attend(*leaves, CAUSAL)
    else:
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)]


# one tile and parts of tiles, one block of 128 tokens, several, and parts; widths that fill 32 columns or do not;
# groups of 1 to 6 heads; the first two axes never equal
@pytest.mark.parametrize(
    ("rows", "count", "shared", "tokens", "width"),
    [
        (2, 3, 3, 1, 16),
        (1, 2, 2, 16, 32),
        (3, 6, 2, 33, 48),
        (2, 6, 1, 128, 64),
        (2, 4, 2, 161, 80),
        (1, 3, 1, 300, 96),
        (1, 2, 1, 577, 256),
    ],
)
def test_values_and_gradients(rows: int, count: int, shared: int, tokens: int, width: int) -> None:
    q, weight = heads(rows, count, tokens, width), heads(rows, count, tokens, width, seed=1)
    k, v = heads(rows, shared, tokens, width, seed=2), heads(rows, shared, tokens, width, seed=3)
    exact = results(q, k, v, weight, torch.float32, native=False)
    ours = results(q, k, v, weight, torch.bfloat16, native=True)
    fused = results(q, k, v, weight, torch.bfloat16, native=False)
    for i, (expected, found, theirs) in enumerate(zip(exact, ours, fused, strict=True)):
        size, error = expected.norm(), (found.float() - expected).norm()
        assert error <= 1.2 * (theirs.float() - expected).norm() + 1e-5 * size, i
        assert error <= 0.006 * size + 1e-6, i  # bfloat16 has steps of 0.0078


@pytest.mark.hardware("avx512_bf16")
def test_without_a_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = build.load_library("attention.cpp", flags=[f"-mno-amx-{part}" for part in ("bf16", "int8", "tile")])
    tensors = [heads(2, count, 161, 80, seed=i) for i, count in enumerate((6, 2, 2, 6))]
    expected = results(*tensors, torch.bfloat16, native=True)
    monkeypatch.setattr(attention.KERNEL, "_library", vectors)
    for one, two in zip(expected, results(*tensors, torch.bfloat16, native=True), strict=True):
        assert (one - two).norm() < 1e-3 * one.norm()


def test_other_layouts_in_memory() -> None:
    q, k, v, weight = (heads(2, 3, 40, 32, seed=i) for i in range(4))
    expected = results(q, k, v, weight, torch.bfloat16, native=True)
    wide = torch.zeros(2, 3, 40, 64, dtype=torch.bfloat16)
    wide[..., ::2] = q
    others = wide[..., ::2], k.contiguous(), v.transpose(2, 3).contiguous().transpose(2, 3)
    assert all(map(torch.equal, expected, results(*others, weight, torch.bfloat16, native=True)))


def test_later_tokens_are_never_seen() -> None:
    q, k, v = (heads(1, 2, 70, 32, seed=i) for i in range(3))
    before = native_attend(q, k, v, CAUSAL)
    k[:, :, 40:], v[:, :, 40:] = 1e4, float("nan")
    after = native_attend(q, k, v, CAUSAL)
    assert torch.equal(before[:, :, :32], after[:, :, :32])
    assert after[:, :, 40:].isnan().all()


def test_large_scores_and_numbers_that_are_none() -> None:
    q, k, v = (heads(1, 1, 64, 16, seed=i) * 60 for i in range(3))
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(native_attend(q, k, v, CAUSAL).float(), expected, rtol=0.02, atol=1.0)
    q[0, 0, 5, 3] = float("nan")
    out = native_attend(q, k, v, CAUSAL)
    assert out[0, 0, 5].isnan().all()
    assert not out[0, 0, 6:].isnan().any()


def test_the_denominators() -> None:
    q, k, v = (heads(2, 2, 37, 16, seed=i) for i in range(3))
    scores = q.float() @ k.float().mT / 4
    expected = scores.masked_fill(torch.ones(37, 37).triu(1) > 0, -torch.inf).logsumexp(-1)
    found = causal_attention(q, k, v)[1] * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["float32", "mask", "narrow", "cached"])
def test_the_rest_is_left_to_torch(case: str) -> None:
    width = 24 if case == "narrow" else 32
    q, k, v = (heads(1, 2, 20, width, seed=i) for i in range(3))
    mask = CAUSAL
    if case == "float32":
        q, k, v = q.float(), k.float(), v.float()
    elif case == "mask":
        mask = KernelMask(torch.rand(1, 1, 20, 20) > 0.2, False)
    elif case == "cached":
        q, mask = q[:, :, :3], KernelMask(None, False)
    assert torch.equal(native_attend(q, k, v, mask), attend(q, k, v, mask))


def test_the_operator_is_what_torch_expects() -> None:
    inputs = [heads(2, 2, 20, 16, seed=i).requires_grad_() for i in range(3)]
    torch.library.opcheck(causal_attention, tuple(inputs), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_has_the_same_loss_and_gradients(
    compiled: bool, same_training: Callable[[Decoder, Decoder], None]
) -> None:
    config = ModelConfig(dim=96, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=128, vocab_size=64, max_seq_len=80)
    plain = Decoder(config).bfloat16()
    native = copy.deepcopy(plain)
    attention.KERNEL.use(native)
    assert native.blocks[0].self_attn.kernel is native_attend
    if compiled:
        native.compile_blocks()
    same_training(plain, native)


def test_it_is_repeatable_with_any_number_of_threads() -> None:
    inputs = [heads(2, 4, 200, 32, seed=i) for i in range(4)]
    threads, found = torch.get_num_threads(), []
    for count in (1, 1, 2, 3):
        torch.set_num_threads(count)
        found.append(results(*inputs, torch.bfloat16, native=True))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for other in found[1:] for one, two in zip(found[0], other, strict=True))
