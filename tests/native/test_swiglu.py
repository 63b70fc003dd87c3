"""SwiGLU in C++ against torch's in float32: values, gradients, what it leaves to torch, compiled blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.layers.mlp import swiglu
from minillama.model import Decoder
from minillama.native import build
from minillama.native import swiglu as native
from minillama.native.swiglu import native_swiglu

KERNELS, UNITS, EMULATED = native, ("amx_bf16",), ("tiles",)
pytestmark = [
    pytest.mark.skipif(not build.can_build(), reason="no C++ compiler, or not Linux"),
    pytest.mark.usefixtures("kernels"),
]


def tensors(tokens: tuple[int, ...], dim: int, hidden: int, seed: int = 0) -> list[Tensor]:
    """x, gate, up, down in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*tokens, dim), (hidden, dim), (hidden, dim), (dim, hidden))
    scales = (2.0, dim**-0.5, dim**-0.5, hidden**-0.5)
    return [(torch.randn(s, generator=generator) * scale).bfloat16() for s, scale in zip(shapes, scales, strict=True)]


def results(inputs: list[Tensor], dtype: torch.dtype, in_cpp: bool) -> list[Tensor]:
    """The output and the gradients of x and the weights."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    x, gate, up, down = leaves
    y = native.mlp(*leaves) if in_cpp else F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return [y.detach(), *torch.autograd.grad((y * weight.to(dtype)).sum(), leaves)]


# one tile, parts of tiles, one block of 256 tokens, a block and more, a chunk of 512 and more; widths that fill the
# parts of a weight's gradient, 512 by 64, or go beyond; never the same twice
@pytest.mark.parametrize(
    ("tokens", "dim", "hidden"),
    [((1,), 32, 64), ((2, 33), 96, 32), ((256,), 64, 160), ((3, 100), 544, 96), ((5, 111), 32, 352)],
)
def test_values_and_gradients(tokens: tuple[int, ...], dim: int, hidden: int) -> None:
    inputs = tensors(tokens, dim, hidden)
    exact = results(inputs, torch.float32, in_cpp=False)
    ours, theirs = (results(inputs, torch.bfloat16, in_cpp=in_cpp) for in_cpp in (True, False))
    for i, (expected, found, other) in enumerate(zip(exact, ours, theirs, strict=True)):
        error = (found.float() - expected).norm()
        assert error <= 1.01 * (other.float() - expected).norm(), i
        assert error <= 0.004 * expected.norm(), i  # bfloat16 has steps of 0.0078


def test_rounds_of_chunks_and_threads_make_no_difference() -> None:
    inputs = tensors((1130,), 64, 160)  # three chunks: three rounds of one thread, one of three
    exact = results(inputs, torch.float32, in_cpp=False)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(results(inputs, torch.bfloat16, in_cpp=True))
    torch.set_num_threads(threads)
    for expected, one, *others in zip(exact, *found, strict=True):
        assert (one.float() - expected).norm() <= 0.004 * expected.norm()
        assert all(torch.equal(one, other) for other in others)


def test_no_tokens() -> None:
    x, *weights = tensors((0,), 32, 64)
    leaves = [w.requires_grad_() for w in weights]
    native.mlp(x, *leaves).sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("scale", [300, 1e6, 1e9])
def test_large_numbers_and_numbers_that_are_none(scale: float) -> None:
    x, gate, up, down = tensors((64,), 32, 32)
    gate *= scale  # beyond what sigmoid and its slope can tell from 0 and 1
    expected = results([x, gate, up, down], torch.float32, in_cpp=False)
    for one, two in zip(results([x, gate, up, down], torch.bfloat16, in_cpp=True), expected, strict=True):
        assert (one.float() - two).norm() < 0.01 * two.norm()
    x[5, 3] = float("nan")
    y = native.mlp(x, gate, up, down)
    assert y[5].isnan().all()
    assert not y[6:].isnan().any() and not y[:5].isnan().any()


def test_frozen_weights_and_a_frozen_input() -> None:
    inputs = tensors((70,), 64, 96)
    of_x, *of_weights = results(inputs, torch.bfloat16, in_cpp=True)[1:]
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    x, *weights = inputs
    leaf = x.clone().requires_grad_()
    (native.mlp(leaf, *weights) * weight).sum().backward()
    assert torch.equal(leaf.grad, of_x)  # type: ignore[arg-type]
    leaves = [w.clone().requires_grad_() for w in weights]
    (native.mlp(x, *leaves) * weight).sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, of_weights, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["float32", "few tokens", "bias", "narrow"])
def test_the_rest_is_left_to_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "mlp", lambda *_: pytest.fail("taken"))
    dim = 40 if case == "narrow" else 64
    parts = [nn.Linear(*s, bias=case == "bias") for s in ((dim, 96), (dim, 96), (96, dim))]
    x = torch.randn(3 if case == "few tokens" else 70, dim)
    if case != "float32":
        x, parts = x.bfloat16(), [part.bfloat16() for part in parts]
    assert torch.equal(native_swiglu(x, *parts), swiglu(x, *parts))


def test_wrong_shapes_are_refused() -> None:
    x, gate, up, down = tensors((70,), 64, 96)
    for wrong in (
        [x[:, :32], gate, up, down],
        [x, gate, up[:64], down],
        [x, gate, up, gate],
        [x.float(), gate, up, down],
    ):
        with pytest.raises(ValueError, match="SwiGLU"):
            native.mlp(*wrong)


def test_the_operator_is_what_torch_expects() -> None:
    inputs = [t.requires_grad_() for t in tensors((2, 40), 32, 64)]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(native.mlp, tuple(inputs), test_utils=checks)
    inputs = [t.detach() for t in inputs]
    torch.library.opcheck(native.mlp_backward, (inputs[0], *inputs, True), test_utils=checks)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_has_the_same_loss_and_gradients(
    compiled: bool, same_training: Callable[[Decoder, Decoder], None]
) -> None:
    config = ModelConfig(dim=96, n_layers=2, n_heads=6, hidden_dim=160, vocab_size=64, max_seq_len=80)
    plain = Decoder(config).bfloat16()
    ours = copy.deepcopy(plain)
    native.KERNEL.use(ours)
    assert ours.blocks[0].mlp.kernel is native_swiglu
    if compiled:
        ours.compile_blocks()
    same_training(plain, ours)


def test_it_is_repeatable() -> None:
    inputs = tensors((600,), 64, 160)
    first, second = (results(inputs, torch.bfloat16, in_cpp=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
