"""What makes a step faster does not change what is learnt: loss curves over 500 steps, with and without."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.layers.attend import blocked_causal
from minillama.layers.cross_entropy import cross_entropy
from minillama.layers.mask import KernelMask
from minillama.model import Decoder
from minillama.native import build
from minillama.native.attention import native_attend
from minillama.native.swiglu import native_swiglu
from minillama.runs.sections import OptimConfig
from minillama.training.compile import use_native_kernels
from minillama.training.optim.groups import make_optimizers
from minillama.training.precision import choose_precision

STEPS = 500


def text() -> Tensor:
    """Ids of sums in words, whose ends can be learnt and whose beginnings cannot."""
    numbers = ["nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    generator = torch.Generator().manual_seed(5)
    pairs = torch.randint(0, 5, (4000, 2), generator=generator).tolist()
    written = "".join(f"{numbers[a]} and {numbers[b]} make {numbers[a + b]}. " for a, b in pairs)
    return torch.tensor(list(written.encode())) - 32


def curve(plain_loss: bool = False, dtype: torch.dtype = torch.float32, native: bool = False) -> list[float]:
    """Mean losses of each fifty steps."""
    ids = text()
    generator = torch.Generator().manual_seed(1)
    config = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=96, max_seq_len=48)
    model = Decoder(config)
    model.init_weights(generator)
    working = choose_precision(model, dtype)
    if native:
        use_native_kernels([working.model], working.model, lambda said: None)
        assert all(
            part.kernel in (native_attend, native_swiglu) for part in working.model.modules() if hasattr(part, "kernel")
        )
    optimizers = make_optimizers(model, OptimConfig(lr=3e-3))
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - 49, (8,), generator=generator)
        rows = torch.stack([ids[start : start + 49] for start in starts.tolist()])
        hidden, targets = working.model.hidden(rows[:, :-1]), rows[:, 1:]
        head, loss_of = working.model.head, working.model.loss
        total = cross_entropy(head(hidden), targets) if plain_loss else loss_of(hidden, targets)
        loss = total / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        working.refresh()
        losses.append(loss.item())
    return [statistics.mean(losses[at : at + 50]) for at in range(0, STEPS, 50)]


def blocks(q: Tensor, k: Tensor, v: Tensor, mask: KernelMask) -> Tensor:
    return blocked_causal(q, k, v, block=16)


def weights_in_full(q: Tensor, k: Tensor, v: Tensor, mask: KernelMask) -> Tensor:
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return F.softmax(scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, -torch.inf), dim=-1) @ v


@pytest.mark.slow
@pytest.mark.parametrize("change", ["plain loss", "attention in blocks", "attention weights in full"])
def test_curves_agree(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = curve()
    if change != "plain loss":
        kernel = blocks if change == "attention in blocks" else weights_in_full
        monkeypatch.setattr("minillama.layers.attention.attend", kernel)
    found = curve(plain_loss=change == "plain loss")
    assert expected[-1] < expected[0] - 1
    assert found == pytest.approx(expected, abs=0.015)  # nats; rounding alone moves a mean by 0.01


@pytest.mark.slow
@pytest.mark.hardware("avx512_bf16", "amx_bf16")
@pytest.mark.skipif(not build.can_build(), reason="no C++ compiler, or not Linux")
def test_curves_agree_in_bfloat16_and_in_cpp() -> None:
    exact, plain = curve(), curve(dtype=torch.bfloat16)
    found = curve(dtype=torch.bfloat16, native=True)
    assert found == pytest.approx(plain, abs=0.02)
    assert found == pytest.approx(exact, abs=0.03)
