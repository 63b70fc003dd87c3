"""A step of GRPO and of PPO on rollouts equals the formulas, computed from logits of whole answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minillama.runs.feedback import GRPOConfig, PPOConfig

from .test_rollouts import GROUPS, Constant, losses, moved, objective


@pytest.mark.parametrize("settings", GROUPS)
def test_a_step_of_grpo_is_that_of_the_formulas(settings: GRPOConfig) -> None:
    """Answer by answer, from all logits of rows without padding: reference, old and new policy are three models."""
    made = objective(settings)
    moved(made, 0.03)
    recorded = made.prepare(0)
    old = moved(made, 0.05)
    terms, metrics = losses(made, 0)
    rows, baseline = made.buffer, settings.baseline
    logs: dict[str, list[Tensor]] = {"new": [], "old": [], "reference": []}
    entropies, rewards = [], []
    for tokens, targets, mask in zip(rows["tokens"], rows["targets"], rows["mask"], strict=True):
        stop = int(mask.nonzero().amax()) + 1 if mask.any() else 0  # nothing of an answer that cannot be scored
        if not stop:
            rewards.append(math.nan)
            entropies.append(torch.zeros(0))
            for values in logs.values():
                values.append(torch.zeros(0))
            continue
        for name, model in (("new", made.model), ("old", old), ("reference", made.companions["reference"])):
            with torch.no_grad():
                found = (model(tokens[None, :stop])[0] / settings.temperature).log_softmax(-1)[mask[:stop]]
            logs[name].append(found.gather(1, targets[mask][:, None])[:, 0])
            if name == "new":
                entropies.append(-(found.exp() * found).sum(1))
        ids = targets[mask]
        rewards.append(float((ids % 2 == 0).sum()))
    kl = [float((a - b).sum()) for a, b in zip(logs["old"], logs["reference"], strict=True)]
    if "kl" in recorded:
        assert recorded["kl"] == pytest.approx(sum(kl) / sum(len(row) > 0 for row in entropies), abs=1e-5)
    policy, penalty, total, share = 0.0, 0.0, 0, made._order(0, 0, 0).tolist()
    share = [row for row in share if rewards[row] == rewards[row]]
    for row in share:
        start = row // settings.samples * settings.samples
        group = [reward for reward in rewards[start : start + settings.samples] if reward == reward]
        mean = sum(group) / max(1, len(group))
        advantage = rewards[row] - mean if len(group) > 1 else 0.0
        if baseline == "std" and advantage:
            advantage /= torch.tensor(group).std().item() + 1e-4
        elif baseline == "leave-one-out" and advantage:
            advantage *= len(group) / (len(group) - 1)
        if settings.kl == "k1":  # whatever the rewards' standard deviation
            pairs = zip(kl, rewards, strict=True)
            others = [value for value, reward in list(pairs)[start : start + settings.samples] if reward == reward]
            advantage -= settings.beta * (kl[row] - sum(others) / len(others))
        new = logs["new"][row]
        ratio = (new - logs["old"][row]).exp() if settings.updates > 1 else torch.ones(len(new))
        losing = -torch.minimum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))
        d = new - logs["reference"][row]
        own = {"k1": d * 0, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[settings.kl] * settings.beta
        weight = {"tokens": 1.0, "answers": 1 / len(new), "length": 1.0}[settings.average]
        policy, penalty = policy + float(losing.sum()) * weight, penalty + float(own.sum()) * weight
        total += len(new)
    divisor = {"tokens": total, "answers": len(share), "length": len(share) * 9}[settings.average]
    assert terms["policy"] == pytest.approx(policy / divisor, abs=1e-5)
    assert ("kl_penalty" in terms) == (settings.kl != "k1")  # in a loss k1 would do nothing
    assert terms.get("kl_penalty", 0) == pytest.approx(penalty / divisor, abs=1e-6)
    chosen = torch.cat([entropies[row] for row in share])
    assert metrics["entropy"] == pytest.approx(chosen.mean().item(), abs=1e-5)
    new, was, base = (torch.cat([values[row] for row in share]) for values in logs.values())
    if settings.updates > 1:
        assert metrics["approx_kl"] == pytest.approx(((new - was).exp() - 1 - new + was).mean().item(), abs=1e-5)
    else:
        assert metrics["kl"] == pytest.approx((new - base).sum().item() / len(share), abs=1e-4)


@pytest.mark.parametrize("baseline", ["std", "mean", "leave-one-out"])
def test_equal_rewards_leave_the_kl_alone_in_the_advantage(baseline: str) -> None:
    """Not divided by a standard deviation that is the KL's own; and no signal is counted."""
    made = objective(GRPOConfig(max_new_tokens=9, samples=4, kl="k1", beta=0.01, baseline=baseline))  # type: ignore[arg-type]
    made.rewards = Constant()  # type: ignore[assignment]
    moved(made, 0.05)
    assert made.prepare(0)["groups_with_signal"] == 0
    kl = (made.buffer["old"] - made.buffer["reference"]).sum(1).view(2, 4)
    expected = -0.01 * (kl - kl.mean(1, keepdim=True)) * (4 / 3 if baseline == "leave-one-out" else 1)
    found = made.buffer["advantages"].sum(1) / made.buffer["mask"].sum(1)
    torch.testing.assert_close(found, expected.flatten(), atol=1e-6, rtol=1e-4)
    assert 1e-4 < found.abs().max() < 0.5


@pytest.mark.parametrize("policy", ["gspo", "cispo"])
def test_other_policy_losses_of_a_step(policy: str) -> None:
    """From the buffer, answer by answer; the first ratios are 1."""
    settings = GRPOConfig(max_new_tokens=9, samples=4, minibatches=2, average="answers", policy=policy)  # type: ignore[arg-type]
    made = objective(settings)
    made.prepare(0)
    assert losses(made, 0)[1]["clipped"] == 0
    moved(made, 0.05)
    batch, total = made.batch(0), 0.0
    with torch.no_grad():
        found, _ = made.log_probabilities(made.model, batch)
    for new, old, advantage, mask in zip(found, *(batch.extras[n] for n in ("old", "advantages", "mask")), strict=True):
        if not mask.any():
            continue
        ratio, a = (new - old)[mask].exp(), advantage[mask]
        if policy == "gspo":
            ratio = ratio.log().mean().exp()
            own = -torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.2))
        else:
            own = -ratio.clamp(max=1.2) * a * new[mask]
        total += own.mean().item()
    rows = int(batch.extras["mask"].any(1).sum())
    assert losses(made, 0)[0]["policy"] == pytest.approx(total / rows, abs=1e-5)


def test_a_step_of_ppo_is_that_of_the_formulas() -> None:
    """From the buffer alone, row by row, without masks: advantages, policy, value and KL terms."""
    settings = PPOConfig(max_new_tokens=9, minibatches=1, epochs=2, beta=0.3, cut_off=2.0, gamma=0.9, lam=0.8)
    made = objective(settings)
    moved(made, 0.05)  # away from the reference
    made.prepare(0)
    rows, advantages, returns = made.buffer, [], []
    for i, row in enumerate(rows["mask"]):
        ids, old, ref, values = (rows[n][i][row] for n in ("targets", "old", "reference", "values"))
        if not len(ids):
            assert rows["targets"][i][0] >= 0  # an answer that no reward could score
            continue
        ended = int(ids[-1]) == 256
        score = sum(int(j) % 2 == 0 for j in ids) - (0.0 if ended else 2.0)
        reward = -0.3 * (old - ref)
        reward[-1] += score
        running = following = torch.zeros(())
        found = []
        for t in reversed(range(len(ids))):
            running = reward[t] + 0.9 * following - values[t] + 0.9 * 0.8 * running
            following = values[t]
            found.append(running)
        advantages.append(torch.stack(found[::-1]))
        returns.append(torch.stack(found[::-1]) + values)
    flat = torch.cat(advantages)
    white = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    torch.testing.assert_close(rows["advantages"][rows["mask"]], white, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows["returns"][rows["mask"]], torch.cat(returns), atol=1e-5, rtol=1e-5)
    terms, _ = losses(made, 0)
    assert terms["policy"] == pytest.approx(-white.mean().item(), abs=1e-6)
    old_values = rows["values"][rows["mask"]]
    assert terms["value"] == pytest.approx(
        0.1 * 0.5 * (old_values - torch.cat(returns)).square().mean().item(), rel=1e-4
    )
