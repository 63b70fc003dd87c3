"""Known answers for RMSNorm and RoPE."""

from __future__ import annotations

import math

import pytest
import torch

from minillama.config import ModelConfig, RopeScaling
from minillama.layers.norm import RMSNorm
from minillama.layers.rope import Rope, inverse_frequencies, rotate


def test_rms_norm_of_one_to_four() -> None:
    y = RMSNorm(4, 1e-5)(torch.tensor([1.0, 2, 3, 4]))
    torch.testing.assert_close(y, torch.tensor([0.36514813, 0.73029626, 1.09544438, 1.46059251]))


def test_rms_norm_keeps_the_input_type_and_weighs() -> None:
    norm = RMSNorm(4, 1e-5)
    norm.weight.data = torch.tensor([1.0, 10, 100, 1000])
    y = norm(torch.tensor([1.0, 2, 3, 4], dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), torch.tensor([0.365, 7.30, 109.5, 1460.0]), rtol=0.01, atol=0)


def test_rotation_at_position_one() -> None:
    config = ModelConfig(dim=4, n_heads=1, n_layers=1, vocab_size=8)
    cos, sin = Rope(config)(torch.tensor([1]))
    x = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4)
    expected = torch.tensor([-1.98411065, 1.95990067, 2.4623779, 4.01979967])
    torch.testing.assert_close(rotate(x, cos, sin).flatten(), expected)


def test_scores_depend_on_distance_alone() -> None:
    config = ModelConfig(dim=16, n_heads=1, n_layers=1, vocab_size=8)
    rope, (q, k) = Rope(config), torch.randn(2, 1, 1, 1, 16)

    def score(i: int, j: int) -> float:
        return (rotate(q, *rope(torch.tensor([i]))) * rotate(k, *rope(torch.tensor([j])))).sum().item()

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_frequencies_of_llama() -> None:
    w = inverse_frequencies(128, 1e4)
    torch.testing.assert_close(w[[0, 1, 2, 63]], torch.tensor([1, 0.86596432, 0.74989421, 1.15478198e-4]))
    assert inverse_frequencies(128, 5e5)[-1].item() == pytest.approx(2.45514079e-6, rel=1e-5)


def test_llama3_scaling_divides_only_slow_pairs() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    ratio = inverse_frequencies(128, 5e5) / inverse_frequencies(128, 5e5, scaling)
    blended = torch.tensor([1.20748387, 1.55341463, 2.02631321, 2.69452969, 3.68425253, 5.25734])
    torch.testing.assert_close(ratio[:29], torch.ones(29))
    torch.testing.assert_close(ratio[29:35], blended, rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[35:], torch.full((29,), 8.0))


def test_linear_and_ntk_scaling() -> None:
    plain = inverse_frequencies(64)
    torch.testing.assert_close(inverse_frequencies(64, scaling=RopeScaling("linear", 4.0)), plain / 4)
    ntk = inverse_frequencies(64, scaling=RopeScaling("ntk", 4.0))
    assert ntk[0] == 1
    assert (plain[-1] / ntk[-1]).item() == pytest.approx(4.0, rel=1e-4)
    assert (plain[1] / ntk[1]).item() == pytest.approx(4 ** (2 / 62), rel=1e-4)
    assert math.isclose(ntk[16].item(), (10000 * 4 ** (64 / 62)) ** (-32 / 64), rel_tol=1e-4)


def test_frequencies_stay_float32_when_the_model_does_not() -> None:
    rope = Rope(ModelConfig(dim=64, n_heads=1, n_layers=1, vocab_size=8))
    exact = rope.frequencies.clone()
    assert torch.equal(rope.to(torch.bfloat16).frequencies, exact)
    assert rope.to("meta").frequencies.is_meta
