"""Causal attention in float32 in C++ against torch's in double precision, per instruction set."""

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
from minillama.native.attention import causal_attention, native_attend, native_attend_float
from minillama.training.compile import use_native_kernels

pytestmark = [
    pytest.mark.skipif(not build.can_build(), reason="no C++ compiler, or not Linux"),
    pytest.mark.hardware("avx2"),
    pytest.mark.usefixtures("instruction_set"),
]
CAUSAL = KernelMask(None, True)
# the processor's own, AVX2, and four floats per vector as NEON has them
SETS = ["native", "haswell", pytest.param("x86-64", marks=pytest.mark.slow)]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the kernel compiled for that instruction set."""
    monkeypatch.setenv(build.MARCH, request.param)
    monkeypatch.setattr(attention.FLOAT, "_library", None)


def heads(*shape: int, seed: int = 0) -> Tensor:
    """(B, H, T, E), in memory as (B, T, H, E)."""
    rows, count, tokens, width = shape
    numbers = torch.randn(rows, tokens, count, width, generator=torch.Generator().manual_seed(seed))
    return (numbers * 1.5).transpose(1, 2)


def results(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, dtype: torch.dtype, native: bool) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    if native:
        out = causal_attention(*leaves)[0]
    else:
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)]


# one token, parts of a vector and of a register tile, one block of 64 tokens, several, and parts; widths of one, three
# and five vectors and of parts of one; groups of 1 to 6 heads; the first two axes never equal
@pytest.mark.parametrize(
    ("rows", "count", "shared", "tokens", "width"),
    [
        (2, 3, 3, 1, 8),
        (1, 2, 2, 16, 32),
        (3, 6, 2, 33, 48),
        (3, 6, 6, 64, 24),
        (2, 6, 1, 128, 64),
        (2, 4, 2, 161, 40),
        (1, 3, 1, 300, 96),
        (1, 2, 1, 577, 256),
    ],
)
def test_values_and_gradients_are_those_of_double_precision(
    rows: int, count: int, shared: int, tokens: int, width: int
) -> None:
    q, weight = heads(rows, count, tokens, width), heads(rows, count, tokens, width, seed=1)
    k, v = heads(rows, shared, tokens, width, seed=2), heads(rows, shared, tokens, width, seed=3)
    exact = results(q, k, v, weight, torch.float64, native=False)
    ours = results(q, k, v, weight, torch.float32, native=True)
    fused = results(q, k, v, weight, torch.float32, native=False)
    for i, (expected, found, theirs) in enumerate(zip(exact, ours, fused, strict=True)):
        size, error = expected.norm(), (found.double() - expected).norm()
        assert error <= 1.5 * (theirs.double() - expected).norm() + 2e-7 * size + 1e-5, i
        assert error <= 2e-6 * size + 1e-5, i  # of one token they are 0


def test_other_layouts_in_memory() -> None:
    q, k, v, weight = (heads(2, 3, 40, 32, seed=i) for i in range(4))
    expected = results(q, k, v, weight, torch.float32, native=True)
    wide = torch.zeros(2, 3, 40, 64)
    wide[..., ::2] = q
    others = wide[..., ::2], k.contiguous(), v.transpose(2, 3).contiguous().transpose(2, 3)
    assert all(map(torch.equal, expected, results(*others, weight, torch.float32, native=True)))


def test_later_tokens_are_never_seen() -> None:
    q, k, v, weight = (heads(1, 2, 150, 32, seed=i) for i in range(4))
    before = native_attend_float(q, k, v, CAUSAL)
    k[:, :, 100:], v[:, :, 100:] = 1e4, float("nan")
    after = native_attend_float(q, k, v, CAUSAL)
    assert torch.equal(before[:, :, :92], after[:, :, :92])  # eight queries are multiplied at a time
    assert after[:, :, 100:].isnan().all()
    weight[:, :, 100:] = 0  # the loss of the first tokens alone
    gradients = results(q, k, v.nan_to_num(0), weight, torch.float32, native=True)[1:]
    assert all(gradient[:, :, :100].norm() > 1 and not gradient[:, :, 100:].any() for gradient in gradients)


def test_large_scores_and_numbers_that_are_none() -> None:
    q, k, v = (heads(1, 1, 64, 16, seed=i) * 60 for i in range(3))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(native_attend_float(q, k, v, CAUSAL).double(), expected, rtol=1e-4, atol=0.02)
    q[0, 0, 5, 3] = float("nan")
    out = native_attend_float(q, k, v, CAUSAL)
    assert out[0, 0, 5].isnan().all()
    assert not out[0, 0, 6:].isnan().any()


def test_the_normalizers() -> None:
    q, k, v = (heads(2, 2, 37, 16, seed=i) for i in range(3))
    scores = q.double() @ k.double().mT / 4
    expected = scores.masked_fill(torch.ones(37, 37).triu(1) > 0, -torch.inf).logsumexp(-1)
    found = causal_attention(q, k, v)[1].double() * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["bfloat16", "double", "mask", "narrow", "cached", "the other kernel", "idle threads"])
def test_the_rest_is_left_to_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (heads(1, 2, 20, 12 if case == "narrow" else 32, seed=i) for i in range(3))
    mask, kernel = CAUSAL, native_attend_float
    if case in ("bfloat16", "double"):
        q, k, v = (x.to(getattr(torch, case)) for x in (q, k, v))
    elif case == "mask":
        mask = KernelMask(torch.rand(1, 1, 20, 20) > 0.2, False)
    elif case == "cached":
        q, mask = q[:, :, :3], KernelMask(None, False)
    elif case == "the other kernel":
        kernel = native_attend
    elif case == "idle threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        k, v = k[:, :1], v[:, :1]
    monkeypatch.setattr(attention.FLOAT, "_library", None)
    monkeypatch.setattr(attention.FLOAT, "library", pytest.fail)
    assert torch.equal(kernel(q, k, v, mask), attend(q, k, v, mask))


def test_the_operator_is_what_torch_expects() -> None:
    inputs = [heads(2, 2, 20, 16, seed=i).requires_grad_() for i in range(3)]
    torch.library.opcheck(causal_attention, tuple(inputs), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_has_the_same_loss_and_gradients(same_training: Callable[..., None], compiled: bool) -> None:
    config = ModelConfig(dim=96, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=128, vocab_size=64, max_seq_len=80)
    plain = Decoder(config)
    native = copy.deepcopy(plain)
    use_native_kernels([native], native, lambda said: None)  # as a run in float32 does
    assert native.blocks[0].self_attn.kernel is native_attend_float
    if compiled:
        native.compile_blocks()
    same_training(plain, native, loss_error=1e-6, gradient_error=1e-5)


def test_it_is_repeatable_with_any_number_of_threads() -> None:
    inputs = [heads(2, count, 200, 32, seed=i) for i, count in enumerate((4, 2, 2, 4))]
    threads, found = torch.get_num_threads(), []
    for count in (1, 1, 2, 3):
        torch.set_num_threads(count)
        found.append(results(*inputs, torch.float32, native=True))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for other in found[1:] for one, two in zip(found[0], other, strict=True))
