"""Plans: Sardana's example, published models' shapes and rates, what the answer says of its own doubts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.scaling.laws import Law
from minillama.scaling.planning import cheapest, plan, predicted_loss, tokens_for_loss
from minillama.scaling.shapes import batch_tokens, learning_rate, nearest, shape, shapes, size

LAWS = {"exact": Law.load("chinchilla"), "rounded": Law(1.69, 406.4, 410.7, 0.34, 0.28), "epoch": Law.load("epoch")}
BASE = ModelConfig()


@pytest.mark.parametrize(
    ("name", "tokens", "loss", "tokens_7b", "total", "total_7b", "best"),
    [
        ("exact", 6.174e11, 2.02385, 1.329e12, 1.002e23, 8.383e22, (7.120e9, 1.2952e12)),
        ("rounded", 9.917e11, 2.01768, 2.132e12, 1.294e23, 1.176e23, (8.023e9, 1.7489e12)),
        ("epoch", 2.595e11, 2.10230, 5.753e11, 7.224e22, 5.216e22, (6.094e9, 7.3596e11)),
    ],
)
def test_sardanas_example(
    name: str, tokens: float, loss: float, tokens_7b: float, total: float, total_7b: float, best: tuple[float, float]
) -> None:
    """The quality of a compute-optimal 13B with 2T tokens of inference; the paper saves 1.7e22 FLOPs, 17 %, with 7B."""
    law, inference = LAWS[name], 2e12
    alone = plan(law, BASE, params=13e9)
    assert alone.optimum == pytest.approx((13e9, tokens), rel=3e-4)
    assert alone.optimum_loss == pytest.approx(loss, abs=6e-6)
    seven = tokens_for_loss(law, 7e9, alone.optimum_loss)
    assert seven == pytest.approx(tokens_7b, rel=4e-4)
    for params, count, expected in ((*alone.optimum, total), (7e9, seven, total_7b)):
        assert params * (6 * count + 2 * inference) == pytest.approx(expected, rel=1e-3)
    both = plan(law, BASE, params=13e9, inference=inference)
    assert both.optimum == pytest.approx(best, rel=1e-3)
    assert both.optimum_loss == pytest.approx(alone.optimum_loss, rel=1e-9)
    assert both.saved >= 1 - total_7b / total - 1e-3
    if name == "exact":
        assert both.saved == pytest.approx(0.163, abs=1e-3)
        assert any("fits overestimate" in note for note in both.notes)


def test_a_loss_out_of_reach() -> None:
    with pytest.raises(InputError, match="below the irreducible one"):
        cheapest(LAWS["exact"], 1.69, 1e12)
    assert tokens_for_loss(LAWS["exact"], 1e7, 2.0) == math.inf
    for given in ({"params": 1e20}, {"tokens": 1e25}):
        with pytest.raises(InputError, match="beyond what is searched"):
            plan(LAWS["exact"], BASE, **given)


@pytest.mark.parametrize(
    ("name", "dim"), [("llama-7b", 4096), ("llama-13b", 5120), ("stories42m", 512), ("llama-tiny", 256)]
)
def test_shapes_are_those_of_published_models(name: str, dim: int) -> None:
    """Width to feed-forward width; at LLaMA's sizes the depth and heads, too."""
    preset = ModelConfig.load(name)
    made = shape(dim, preset)
    assert made.hidden_dim == preset.hidden_dim
    if dim >= 4096:
        assert (made.n_layers, made.n_heads, made.head_dim) == (preset.n_layers, preset.n_heads, preset.head_dim)
        assert made.num_params() == preset.num_params()


@pytest.mark.parametrize(("dim", "layers"), [(3072, 28), (12288, 96), (16384, 128), (1024, 16)])
def test_depth(dim: int, layers: int) -> None:
    """Llama 3.2 3B has 28 layers, GPT-3 96, Llama 3.1 405B 126."""
    assert shape(dim, BASE).n_layers == layers


def test_shapes_rise_and_can_be_built() -> None:
    for head in (0, 16, 48):
        every = list(shapes(BASE, head))
        sizes = [size(config) for config in every]
        assert sizes == sorted(set(sizes))
        assert max(b / a for a, b in pairwise(sizes) if a > 1e7) < 1.35
        assert all(c.n_heads * c.head_dim == c.dim and (not head or c.head_dim == head) for c in every)
    for params in (3e6, 1e9, 7e10):
        assert size(nearest(params, BASE)) == pytest.approx(params, rel=0.2)


@pytest.mark.parametrize(("flops", "rate", "rows"), [(6 * 7e9 * 2e12, 4.2e-4, 2304), (6 * 67e9 * 2e12, 3.2e-4, 4608)])
def test_rates_are_deepseeks(flops: float, rate: float, rows: int) -> None:
    """Of their 7B and 67B, with sequences of 4,096 tokens."""
    assert learning_rate(flops) == pytest.approx(rate, rel=0.02)
    assert batch_tokens(flops) == pytest.approx(rows * 4096, rel=0.03)


def test_a_budget_is_spent_exactly() -> None:
    found = plan(LAWS["epoch"], BASE, flops=1e21)
    assert found.tokens * found.shape.flops_per_token(2048) == pytest.approx(1e21) == pytest.approx(found.flops)
    assert found.rows * found.steps * 2048 == pytest.approx(found.tokens, rel=1e-4)
    assert found.loss == LAWS["epoch"].loss(found.params, found.tokens) and not found.saved
    assert found.loss_interval is not None and found.optimum_interval is not None
    assert found.loss_interval[0] < found.loss < found.loss_interval[1]
    assert found.optimum_interval[0] < found.optimum[0] < found.optimum_interval[1]
    assert not found.notes


@pytest.mark.parametrize("unique", [0, 2e9])
def test_every_question_finds_the_same_optimum(unique: float) -> None:
    law = LAWS["exact"]
    by_flops = plan(law, BASE, flops=1e21, unique=unique)
    for question in ({"params": by_flops.optimum[0]}, {"tokens": by_flops.optimum[1]}):
        assert plan(law, BASE, **question, unique=unique).optimum == pytest.approx(by_flops.optimum, rel=1e-5)


def test_repeated_data_moves_the_optimum() -> None:
    law = Law.load("muennighoff")
    plain, repeated = plan(law, BASE, flops=1e22), plan(law, BASE, flops=1e22, unique=25e9)
    assert repeated.optimum[0] < plain.optimum[0] and repeated.optimum_loss > plain.optimum_loss
    assert any("epochs" in note for note in repeated.notes) and not any("epochs" in note for note in plain.notes)
    both = plan(law, BASE, flops=1e22, unique=25e9, inference=1e12)
    assert both.optimum_loss == pytest.approx(repeated.optimum_loss) and both.optimum[0] < repeated.optimum[0]
    assert predicted_loss(law, 1e7, 1e9, 25e9) == pytest.approx(law.loss(1e7, 1e9))  # nothing is repeated


def test_doubts() -> None:
    law = LAWS["exact"]
    assert "44.5 times the FLOPs" in plan(law, BASE, flops=5.76e23).notes[0]
    assert any("of the smallest run" in note for note in plan(law, BASE, flops=1e16).notes)
    steep = Law(3.07, 3.6e8, 1328.0, 1.9, 0.495)
    assert "alpha = 1.9 is degenerate" in plan(steep, BASE, flops=1e14).notes[0]
    assert "no shape of this vocabulary" in plan(law, BASE, params=1e4).notes[0]
