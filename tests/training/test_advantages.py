"""Advantages, KL estimators, clipped losses: worked numbers, TRL's formulas, and the field's defects."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from minillama.evaluate.rewards import whitened
from minillama.training.objectives.advantages import (
    KL,
    Average,
    Baseline,
    adapted_beta,
    averaging,
    cispo_loss,
    gae,
    group_advantages,
    kl_estimate,
    policy_loss,
    sequence_log_ratio,
    token_rewards,
    value_loss,
    whiten,
)

NAN = math.nan


def close(found: Tensor, expected: object, **tolerance: float) -> None:
    wanted = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, wanted, **({"atol": 1e-5, "rtol": 1e-5} | tolerance))


def test_gae_of_the_worked_example() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(tensor([[0.0, 0, 1]]), tensor([[0.5, 0.6, 0.7]]), mask, 0.9, 0.8)
    close(advantages, [[0.21712, 0.246, 0.3]])
    close(returns, [[0.71712, 0.846, 1.0]])


def test_padding_and_observations_are_carried_over() -> None:
    """Tokens that nobody chose, wherever they are and whatever they hold, leave the others' advantages alone."""
    rewards, values = tensor([[NAN, 0.0, 9.0, 0, 1, NAN]]), tensor([[NAN, 0.5, NAN, 0.6, 0.7, math.inf]])
    mask = tensor([[False, True, False, True, True, False]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    close(advantages, [[0, 0.21712, 0, 0.246, 0.3, 0]])
    close(returns, [[0, 0.71712, 0, 0.846, 1.0, 0]])


def test_rewards_and_gae_of_an_answer_with_kl() -> None:
    """DeepSpeed-Chat's example: score 7 clipped to 5, coefficient 0.1."""
    log_probs, reference = tensor([[-1.0, -2, -0.5, NAN]]), tensor([[-1.2, -1.5, -0.5, 3]])
    mask = tensor([[True, True, True, False]])
    kl = kl_estimate(log_probs, reference, "k1")
    rewards = token_rewards(kl, tensor([7.0]).clamp(-5, 5), mask, 0.1)
    close(rewards, [[-0.02, 0.05, 5.0, 0]])
    advantages, returns = gae(rewards, tensor([[0.5, 0.4, 0.3, 8]]), mask, 1.0, 0.95)
    close(advantages, [[4.07425, 4.415, 4.7, 0]])
    close(returns, [[4.57425, 4.815, 5.0, 0]])
    close(whiten(advantages, mask), [[-1.0283381, 0.0593170, 0.9690212, 0]])


def test_whitening_is_over_the_answers_alone() -> None:
    close(whiten(tensor([1.0, 2, 3])), [-1, 0, 1])
    for garbage in (0.0, 1e9, NAN, math.inf):
        values, mask = tensor([[1.0, garbage, 2], [3, garbage, garbage]]), tensor([[1, 0, 1], [1, 0, 0]]).bool()
        close(whiten(values, mask), [[-1, 0, 0], [1, 0, 0]])
    close(whiten(tensor([1.0, 2, 3]), shift_mean=False), [1, 2, 3])
    close(whiten(tensor([5.0])), [0])


def test_the_pieces_of_ppo_are_those_of_trl() -> None:
    """The numbers are what the lines of TRL 1.12.0's own code give for these arrays.

    `masked_whiten` and, of `PPOTrainer.train` in trl/experimental/ppo/ppo_trainer.py, the lines from `lastgaelam = 0`
    to `masked_fill(advantages, ...)` and from `vpredclipped` to `pg_clipfrac`, executed with gamma 0.9, lam 0.8,
    cliprange 0.2, cliprange_value 0.2 and `padding_mask_p1 = padding_mask` (`pip install --no-deps trl==1.12.0`).
    """
    mask = tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    rewards = tensor([[0.1, -0.2, 0.3, 1.0], [-0.4, 0.5, NAN, NAN]])
    values = tensor([[0.5, 0.6, -0.1, 0.2], [0.3, -0.7, NAN, NAN]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    close(returns, [[0.5984706, 0.5423202, 1.0560001, 1.0], [-0.1659998, 0.5000001, 0, 0]], atol=1e-6)
    white = whiten(advantages, mask)
    close(white, [[-0.5144057, -0.7396184, 1.0108488, 0.4973967], [-1.3285304, 1.074309, 0, 0]], atol=1e-6)
    old = tensor([[-1.0, -2.0, -0.5, -1.5], [-0.3, -2.5, 0, 0]])
    new = tensor([[-0.7, -2.1, -0.9, -1.2], [-0.2, -3.0, 0, 0]])
    loss, clipped = policy_loss(new - old, white, 0.2, 0.2)
    close(loss, [[0.694375, 0.6692344, -0.6775922, -0.596876], [1.4682533, -0.6516014, 0, 0]], atol=1e-6)
    assert loss[mask].mean().item() == pytest.approx(0.1509655, abs=1e-6) and clipped.sum().item() == 1  # 0.1666667
    predicted = tensor([[0.9, 0.5, 0.3, 0.1], [0.2, -0.2, 0, 0]])
    found = value_loss(predicted, torch.where(mask, values, 0), returns, 0.2)
    close(2 * found, [[0.09092, 0.001791, 0.9139362, 0.8099999], [0.1339559, 1.0, 0, 0]], atol=1e-6)  # vf_loss_max
    assert found[mask].mean().item() == pytest.approx(0.2458836, abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"), [(1, 1.5, -1.2), (1, 0.5, -0.5), (-1, 1.5, 1.5), (-1, 0.5, 0.8), (-1, 5, 5)]
)
def test_policy_loss(advantage: float, ratio: float, expected: float) -> None:
    loss, clipped = policy_loss(tensor(ratio).log(), tensor(float(advantage)), 0.2, 0.2)
    assert loss.item() == pytest.approx(expected) and clipped.item() == (expected in (-1.2, 0.8))


def test_the_upper_clip_is_its_own() -> None:
    log_ratio, ones = tensor([1.27, 1.3, 0.75]).log(), torch.ones(3)
    close(policy_loss(log_ratio, ones, 0.2, 0.28)[0], [-1.27, -1.28, -0.75])
    close(policy_loss(log_ratio, -ones, 0.2, 0.28)[0], [1.27, 1.3, 0.8])


@pytest.mark.parametrize(
    ("value", "old", "wanted", "expected", "moves"),
    [(1.0, 0.5, 0.9, 0.02, False), (0.4, 0.5, 2.0, 1.28, True), (1.0, 0.5, 2.0, 0.845, False)],
)
def test_value_loss(value: float, old: float, wanted: float, expected: float, moves: bool) -> None:
    predicted = tensor(value, requires_grad=True)
    loss = value_loss(predicted, tensor(old), tensor(wanted), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6) and (predicted.grad.item() != 0) == moves  # type: ignore[union-attr]


def test_dual_clipping_bounds_the_ratio_where_the_advantage_is_negative() -> None:
    ratio, advantage = tensor([5.0, 5.0, 2.0, 0.5]), tensor([-1.0, 1.0, -1.0, -1.0])
    loss, clipped = policy_loss(ratio.log(), advantage, 0.2, 0.2, 3.0)
    close(loss, [3, -1.2, 2, 0.8])
    assert clipped.tolist() == [True, True, False, True]


def test_the_ratio_of_a_sequence_is_that_of_its_mean() -> None:
    """GSPO: e^mean([.2, -.1, .5]) = 1.2214028, at each token, whose gradient is a third of it."""
    log_ratio = tensor([[0.2, -0.1, 0.5, NAN]], requires_grad=True)
    mask = tensor([[True, True, True, False]])
    found = sequence_log_ratio(log_ratio, mask)
    close(found.detach().exp(), [[1.2214028] * 4])
    loss, _ = policy_loss(found, torch.ones(1, 4), 0.2, 0.3)
    (loss * mask / 3).sum().backward()
    close(log_ratio.grad[mask], [-1.2214028 / 3] * 3)  # type: ignore[index]


def test_cispo_weighs_the_log_probability_by_the_clipped_ratio() -> None:
    log_probs = tensor([-1.0, -2.0, -0.5], requires_grad=True)
    loss, clipped = cispo_loss(log_probs, tensor([0.5, 2.0, 2.0]).log(), tensor([2.0, 1.0, -1.0]), 0.28)
    close(loss.detach(), [1.0, 2.56, -0.64])
    loss.sum().backward()
    close(log_probs.grad, [-1.0, -1.28, 1.28])  # type: ignore[arg-type]
    assert clipped.tolist() == [False, True, True]


P, Q = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]


@pytest.mark.parametrize(
    ("kind", "tokens", "mean", "gradient"),
    [
        ("k1", [0.2231436, -0.2876821, 0], 0.0252672, [0, 0, 0]),
        ("k2", [0.0248965, 0.0413805, 0], 0.0248624, [0.0989382, -0.0938848, -0.0050534]),
        ("k3", [0.0231436, 0.0456513, 0], 0.0252672, [0.1, -0.1, 0]),
    ],
)
def test_kl_estimators_and_their_gradients(kind: KL, tokens: list[float], mean: float, gradient: list[float]) -> None:
    """Under p: k1 in a loss does nothing, k2 has the gradient of KL(p || q), k3 that of KL(q || p)."""
    logits = tensor(P).double().log().requires_grad_()
    p, log_p, log_q = tensor(P).double(), logits.log_softmax(0), tensor(Q).double().log()
    found = kl_estimate(log_p, log_q, kind)
    close(found.detach(), tokens)
    assert (p * found.detach()).sum().item() == pytest.approx(mean, abs=1e-6)
    (p * found).sum().backward()
    close(logits.grad, gradient)  # type: ignore[arg-type]
    spread = (p * (found.detach() - mean).square()).sum().sqrt().item()
    assert spread == pytest.approx({"k1": 0.2215545, "k2": 0.0143347, "k3": 0.0159560}[kind], abs=1e-6)


def test_the_reverse_kl() -> None:
    p, q = tensor(P).double(), tensor(Q).double()
    for kind in ("k1", "k3"):
        assert (q * kl_estimate(q.log(), p.log(), kind)).sum().item() == pytest.approx(0.0258154, abs=1e-7)  # type: ignore[arg-type]


def test_whitening_by_the_population() -> None:
    """As LLaMA 2's reward is, and OpenRLHF's advantages."""
    close(whitened(tensor([4.07425, 4.415, 4.7])), [-1.2594518, 0.0726482, 1.1868037])
    close(whitened(tensor([1.0, 0, 0, 1])), [1, -1, -1, 1])


@pytest.mark.parametrize(("kl", "expected"), [(9, 0.201024), (4.5, 0.198976), (6.6, 0.200512), (6, 0.2)])
def test_the_coefficient_follows_its_target(kl: float, expected: float) -> None:
    assert adapted_beta(0.2, kl, 6, 10_000, 256) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("rewards", "baseline", "expected"),
    [
        ([1, 0, 0, 1], "std", [0.8658754, -0.8658754, -0.8658754, 0.8658754]),
        ([1, 0, 0, 1], "mean", [0.5, -0.5, -0.5, 0.5]),
        ([1, 0, 0, 1], "leave-one-out", [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ([1, 0.2, 0.2, 0.2], "std", [1.4996251, -0.4998750, -0.4998750, -0.4998750]),
        ([1, 0.2, 0.2, 0.2], "mean", [0.6, -0.2, -0.2, -0.2]),
        ([1, 0.2, 0.2, 0.2], "leave-one-out", [0.8, -0.8 / 3, -0.8 / 3, -0.8 / 3]),
        ([1, NAN, 0, NAN], "leave-one-out", [1, 0, -1, 0]),
        ([NAN, NAN], "std", [0, 0]),
        ([NAN, 3], "leave-one-out", [0, 0]),
    ],
)
def test_group_advantages(rewards: list[float], baseline: Baseline, expected: list[float]) -> None:
    close(group_advantages(tensor([rewards]), baseline), [expected])


def test_advantages_of_a_smaller_epsilon() -> None:
    """As verl has it."""
    found = group_advantages(tensor([[1.0, 0.0, 0.0, 1.0]]), "std", eps=1e-6)
    close(found, [[0.8660239, -0.8660239, -0.8660239, 0.8660239]])


@pytest.mark.parametrize("baseline", ["std", "mean", "leave-one-out"])
def test_equal_rewards_are_no_signal(baseline: Baseline) -> None:
    for value, count in ((0.3, 6), (0.7, 7), (0.9, 3), (1 / 3, 12), (0.1, 16)):
        assert not group_advantages(torch.full((2, count), value), baseline).any()
    found = group_advantages(tensor([[0.95] * 7 + [0.0]]), baseline)
    assert found.abs().max() <= 8**0.5 and found[0, 7] < 0 < found[0, 0]


@pytest.mark.parametrize(("average", "expected"), [("answers", 2.5), ("tokens", 16 / 6), ("length", 1.6)])
def test_averages(average: Average, expected: float) -> None:
    losses, mask = tensor([[1.0, 3, NAN, NAN], [2, 2, 2, 6]]), tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    weights, total = averaging(mask, average, 5)
    assert ((losses * weights)[mask].sum() / total).item() == pytest.approx(expected)
