"""Reward models, DPO and KTO: worked numbers, invariants, micro-batches, ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.config.lora import LoRAConfig
from minillama.data.preference_set import Judged, Preferences
from minillama.errors import InputError
from minillama.model import Decoder
from minillama.model.heads import with_score
from minillama.model.lora import add_lora, lora_parameters
from minillama.runs.objectives import DPOConfig, KTOConfig
from minillama.training.gradients import accumulate
from minillama.training.objectives.base import DataObjective
from minillama.training.objectives.compared import Compared, batch_of
from minillama.training.objectives.dpo import DPO, LOSSES, dpo_loss
from minillama.training.objectives.kto import KTO, kto_loss, mismatched
from minillama.training.objectives.reward import RewardModel, bradley_terry

CPU = torch.device("cpu")
CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=61, max_seq_len=320)
POLICY, REFERENCE, LENGTHS = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -11.5]), torch.tensor([5.0, 8.0])


@pytest.mark.parametrize(
    ("loss", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, 0.6209570),
        ("sigmoid", 0.1, 0.6359570),
        ("robust", 0.1, 0.6022070),
        ("hinge", 0.0, 0.85),
        ("ipo", 0.0, 12.25),
        ("nca", 0.0, 1.3508248),
        ("bco", 0.0, 1.3128563),
        ("sppo", 0.0, 36.25),
        ("apo-zero", 0.0, 0.9625234),
        ("apo-down", 0.0, 0.9875493),
        ("exo", 0.1, 0.4313885),
        ("forward-kl", 0.0, 0.6311544),
        ("js", 0.0, 0.6606522),
    ],
)
def test_worked_losses_of_pairs(loss: str, smoothing: float, expected: float) -> None:
    found = dpo_loss((POLICY - REFERENCE).double(), loss, 0.1, smoothing)
    assert found.item() == pytest.approx(expected, abs=1e-6)
    DPOConfig(loss=loss, label_smoothing=smoothing)  # type: ignore[arg-type]


def test_worked_losses_per_token_and_the_gradient() -> None:
    means = (POLICY - REFERENCE) / LENGTHS
    assert dpo_loss(means, "ipo").item() == pytest.approx(22.4439063, abs=1e-5)
    assert dpo_loss(means).item() == pytest.approx(0.6801083, abs=1e-6)
    policy = POLICY.clone().requires_grad_()
    dpo_loss(policy - REFERENCE).backward()
    assert policy.grad is not None and policy.grad.tolist() == pytest.approx([-0.0462570, 0.0462570], abs=1e-6)
    h = torch.tensor([2.0, 0.0])
    assert dpo_loss(h).item() == pytest.approx(0.5981389, abs=1e-6)
    assert set(get_args(get_type_hints(DPOConfig)["loss"])) == set(LOSSES)


def test_worked_losses_without_a_reference() -> None:
    means = (POLICY / LENGTHS).double()
    assert dpo_loss(means, "simpo", 2.0, 1.0).item() == pytest.approx(2.1269280, abs=1e-7)
    assert dpo_loss(means, "orpo", 0.1).item() == pytest.approx(2.1042058, abs=1e-7)
    certain = torch.tensor([0.0, -1.0], requires_grad=True)
    dpo_loss(certain, "orpo").backward()
    assert certain.grad is not None and certain.grad.isfinite().all()


@pytest.mark.parametrize(("loss", "beta"), [("simpo", 2.0), ("orpo", 0.1)])
def test_a_step_without_a_reference_is_that_of_the_formula(loss: str, beta: float) -> None:
    plain = moved(objective("dpo"))
    settings = DPOConfig(loss=loss, beta=beta, gamma=0.7)  # type: ignore[arg-type]
    made = DPO(plain.model, plain.data, 1, plain.batch_size, 2, settings)
    assert not made.companions and made.reference is None and made.prepare(0) == {}
    batch, expected = made.batch(0), 0.0
    for i in range(len(batch.tokens)):
        means = []
        for side in range(2):
            with torch.no_grad():
                found = made.model(batch.tokens[i, side][None])[0].log_softmax(-1)
            own = batch.extras["answers"][i, side] > 0
            means.append(found.gather(1, batch.targets[i, side][:, None])[own].mean())
        h = means[0] - means[1]
        if loss == "simpo":
            expected += F.softplus(0.7 - beta * h).item()
        else:
            odds = [mean.exp() / (1 - mean.exp()) for mean in means]
            expected += (-means[0] + beta * (1 + odds[1] / odds[0]).log()).item()
    assert made.loss(batch)[0]["loss"].item() == pytest.approx(expected, abs=1e-4)
    measures = made.validate(2, 0)
    assert not {"val_kl", "val_chosen_log_ratio"} & measures.keys() and 0 <= measures["val_accuracy"] <= 1
    assert made.warnings(measures) == [] and not made.state_dict()["reference"].any()


def test_worked_losses_of_judged_answers() -> None:
    ratios = POLICY - REFERENCE
    found = kto_loss(ratios, torch.tensor([1.0, 0.0]), 0.3)
    assert found.tolist() == pytest.approx([0.4825071, 0.4800107], abs=1e-6)


def test_worked_losses_of_rewards() -> None:
    chosen, rejected = torch.tensor(1.5), torch.tensor(0.5)
    assert bradley_terry(chosen, rejected, center=0.01).item() == pytest.approx(0.3532617, abs=1e-6)
    for margin, expected in ((0, 0.3132617), (1, 0.6931472), (1 / 3, 0.4143701)):
        assert bradley_terry(chosen, rejected, margin).item() == pytest.approx(expected, abs=1e-6)


def test_worked_losses_of_pairs_that_a_judge_is_not_certain_of() -> None:
    # -log sigmoid(1) = 0.3132617, -log sigmoid(-1) = 1.3132617
    one, zero, p = torch.tensor(1.5), torch.tensor(0.5), torch.tensor([1.0, 0.75, 0.5, 0.0])
    found = bradley_terry(one, zero, probability=p)
    assert found.tolist() == pytest.approx([0.3132617, 0.5632617, 0.8132617, 1.3132617], abs=1e-6)
    assert bradley_terry(one, zero, 1.0, probability=p).tolist() == pytest.approx([0.6931472] * 4, abs=1e-6)
    assert torch.equal(found[0], bradley_terry(one, zero))
    chosen = torch.tensor(math.log(3), requires_grad=True)  # sigmoid(log 3) = 0.75: where the loss is least
    bradley_terry(chosen, torch.tensor(0.0), probability=0.75).backward()
    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(0, abs=1e-7)
    # h = 0.15: -log sigmoid(h) = 0.6209570, and 0.15 more for -h; p = 0.8, and a tenth exchanged: 0.26 is on -h
    ratios = (POLICY - REFERENCE).double()
    for smoothing, expected in ((0.0, 0.6509570), (0.1, 0.6599570)):
        assert dpo_loss(ratios, "sigmoid", 0.1, smoothing, torch.tensor(0.8)).item() == pytest.approx(
            expected, abs=1e-6
        )
    assert dpo_loss(ratios, "hinge", 0.1, 0.0, torch.tensor(0.8)).item() == pytest.approx(0.85)


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_probabilities_of_pairs_reach_the_loss(kind: str) -> None:
    plain = moved(objective(kind))
    plain.prepare(0)
    certain = plain.loss(plain.batch(0))[0]["loss"]
    assert ("probability" in plain.batch(0).extras) == (kind == "reward")
    judged = [replace(row, probability=0.75) if number == 2 else row for number, row in enumerate(plain.data.train)]
    made = moved(objective(kind, data=Preferences.of(judged, plain.data.val, 320)))
    assert made.data.fingerprint != plain.data.fingerprint
    made.prepare(0)
    batch, row = made.batch(0), made.data.chosen(1, 0, len(SIZES)).index(2)
    metrics = plain.loss(plain.batch(0).rows(row, row + 1))[1]
    h = metrics["reward_margin"] - (judged[2].label if kind == "reward" else 0)
    assert (made.loss(batch)[0]["loss"] - certain).item() == pytest.approx(0.25 * h.item(), abs=1e-5)  # (1 - p) h more
    parts = [made.loss(batch.rows(start, start + 2))[0]["loss"] for start in range(0, 8, 2)]
    assert sum(parts).item() == pytest.approx(made.loss(batch)[0]["loss"].item(), abs=1e-5)  # type: ignore[union-attr]


def test_swapping_the_answers_swaps_the_losses() -> None:
    ratios = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    one, two = dpo_loss(ratios)
    assert (two - one).item() == pytest.approx(0.15)  # -log sigmoid(-x) = x - log sigmoid(x)
    assert torch.equal(dpo_loss(ratios.flip(-1)), torch.stack([two, one]))


# shapes that differ: answers of 1 to 200 tokens, prompts of 1 to 90
SIZES = [(1, 2, 5), (90, 200, 3), (7, 1, 1), (30, 60, 61), (12, 9, 40), (3, 120, 2), (44, 4, 17), (5, 31, 33)]


def rows(pairs: bool = True) -> list[Judged]:
    rng, found = np.random.default_rng(7), []
    for number, sizes in enumerate(SIZES):
        prompt, *answers = (rng.integers(1, 61, size).tolist() for size in sizes)
        where = f"file:{number}"
        if pairs:
            found.append(Judged.of(prompt, answers, number % 3 / 3, where))
        else:
            found.append(Judged.of(prompt, answers[:1], float(number % 3 == 0), where))
    return found


def decoder(dropout: float = 0.0) -> Decoder:
    made = Decoder(CONFIG, dropout)
    made.init_weights(torch.Generator().manual_seed(2))
    with torch.no_grad():
        made.model.embed_tokens.weight.mul_(20)
    return made


def objective(
    kind: str, micro: int = 8, model: Decoder | None = None, data: Preferences | None = None
) -> DataObjective[Preferences]:
    data = data or Preferences.of(rows(kind != "kto"), rows(kind != "kto")[:3], 320)
    model = model or decoder()
    over = data, 1, len(SIZES)
    if kind == "reward":
        return RewardModel(with_score(model, torch.Generator().manual_seed(4)), *over, center=0.01)
    if kind == "kto":
        return KTO(model, *over, micro, KTOConfig(desirable_weight=1.3))
    settings = {"dpo": DPOConfig(), "dpo + sft": DPOConfig(sft=0.5), "ipo": DPOConfig(loss="ipo", per_token=True)}
    return DPO(model, *over, micro, settings[kind])


KINDS = ["reward", "dpo", "dpo + sft", "ipo", "kto"]


def moved(made: DataObjective[Preferences]) -> DataObjective[Preferences]:
    """The objective after the policy has left the reference."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in made.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return made


def gradients(kind: str, micro: int) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    made = moved(objective(kind, micro))
    made.prepare(0)
    losses = accumulate(made, made.batch(0), micro, CPU)
    named = made.model.named_parameters()
    return losses.loss, dict(losses.record()), {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_neither_loss_nor_gradients_depend_on_the_micro_batch(kind: str) -> None:
    loss, record, whole = gradients(kind, 8)
    assert math.isfinite(loss) and len(whole) > 10
    for micro in (1, 3):
        found, own, grads = gradients(kind, micro)
        assert found == pytest.approx(loss, abs=2e-6) and own == pytest.approx(record, abs=1e-4, rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, whole[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_neither_loss_nor_metrics(kind: str) -> None:
    """Other ids in it, and more of it."""
    made = moved(objective(kind))
    made.prepare(0)
    batch, texts = made.batch(0), rows(kind != "kto")
    chosen = [texts[i] for i in made.data.chosen(1, 0, 8)]
    ends = torch.tensor([[len(row.prompt) + len(answer) for answer in row.answers] for row in chosen])
    tokens, targets = (F.pad(ids, (0, 9), value=60) for ids in (batch.tokens, batch.targets))
    tokens = tokens.where(torch.arange(tokens.shape[-1]) < ends[..., None], 60)
    extras = {n: F.pad(v, (0, 9)) if v.shape == batch.tokens.shape else v for n, v in batch.extras.items()}
    padded = replace(batch, tokens=tokens, targets=targets, extras=extras)
    for found, expected in zip(made.loss(padded), made.loss(batch), strict=True):
        assert {n: v.item() for n, v in found.items()} == pytest.approx(
            {n: v.item() for n, v in expected.items()}, abs=1e-4, rel=1e-5
        )


def test_an_end_token_with_the_id_of_padding_is_of_the_answer() -> None:
    texts = [Judged.of([5, 6], [[7, 0], [0]], 0), Judged.of([0], [[8, 9, 0], [9, 0]], 0)]
    batch = batch_of(texts, 320)
    answers = [batch.targets[i, side][batch.extras["answers"][i, side] > 0].tolist() for i in (0, 1) for side in (0, 1)]
    assert answers == [[7, 0], [0], [8, 9, 0], [9, 0]] and batch.extras["counts"].tolist() == [[2, 1], [3, 2]]


@pytest.mark.parametrize("kind", ["dpo", "dpo + sft", "ipo"])
def test_the_loss_is_that_of_all_logits_pair_by_pair(kind: str) -> None:
    made, old = moved(objective(kind)), decoder()
    made.prepare(0)
    found = accumulate(made, made.batch(0), 8, CPU).loss

    def sums(model: Decoder, row: Judged) -> Tensor:
        values = []
        for answer in row.answers:
            ids = torch.tensor([*row.prompt.tolist(), *answer.tolist()])
            logs = model(ids[None])[0].log_softmax(-1)
            start = len(row.prompt)
            values.append(sum(logs[t - 1, ids[t]] for t in range(start, len(ids))))
        return torch.stack(values)

    with torch.no_grad():
        pairs = [(sums(made.model, row), sums(old, row), [len(a) for a in row.answers]) for row in rows()]
    ratios = torch.stack([policy - reference for policy, reference, _ in pairs])
    lengths = torch.tensor([counts for _, _, counts in pairs])
    if kind == "ipo":
        expected = (ratios[:, 0] / lengths[:, 0] - ratios[:, 1] / lengths[:, 1] - 5).square().mean()
    else:
        expected = -(0.1 * (ratios[:, 0] - ratios[:, 1])).sigmoid().log().mean()
    if kind == "dpo + sft":
        expected += -0.5 * sum(policy[0] for policy, _, _ in pairs) / lengths[:, 0].sum()
    assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("adapter", "micro", "dtype"),
    [
        ("none", 3, torch.float32),
        ("none", 8, torch.bfloat16),
        ("fresh", 8, torch.float32),
        ("trained", 3, torch.float32),
    ],
)
def test_the_first_loss_is_ln_2_exactly(adapter: str, micro: int, dtype: torch.dtype) -> None:
    """After supervised fine-tuning of an adapter too, where the reference is the adapter as it was, not the base."""
    model = decoder().to(dtype)
    if adapter != "none":
        add_lora(model, LoRAConfig(rank=2), generator=torch.Generator().manual_seed(1))
    if adapter == "trained":
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.add_(0.1)
    made = objective("dpo", micro, model)
    made.model.train()
    made.prepare(0)
    batch = made.batch(0)
    for start in range(0, 8, micro):
        terms, metrics = made.loss(batch.rows(start, start + micro))
        count = min(micro, 8 - start)
        assert terms["loss"].item() == pytest.approx(count * math.log(2), abs=1e-7 * count)
        assert metrics["reward_margin"].item() == 0 and metrics["accuracy"].item() == count / 2
    found = made.validate(4, 0)
    assert found["val_loss"] == pytest.approx(math.log(2), abs=1e-7) and found["val_kl"] == 0
    assert found["val_accuracy"] == 0.5 and found["val_longer_wins"] == pytest.approx((0 + 1 + 0.5) / 3)


def test_reference_log_probabilities_are_computed_once_and_come_back() -> None:
    made = objective("dpo")
    assert isinstance(made, Compared)
    made.prepare(0)
    first = made.known.clone()
    assert not first.isnan().any()
    moved(made)
    made.reference.companions["reference"].requires_grad_(False).zero_grad()
    for parameter in made.companions["reference"].parameters():
        parameter.data.mul_(float("nan"))  # it is not asked again
    made.prepare(1)
    assert torch.equal(made.known, first)
    again = objective("dpo")
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.batch(0).extras["reference"], made.batch(0).extras["reference"])


def test_the_chosen_answers_fall_and_there_is_a_warning() -> None:
    made = objective("dpo")
    assert made.warnings(made.validate(4, 0)) == []
    with torch.no_grad():
        made.model.model.norm.weight.mul_(3)
    found = made.validate(4, 0)
    assert found["val_chosen_log_ratio"] < -1 and "nats less likely" in made.warnings(found)[0]


def test_the_reward_is_read_at_the_last_token_of_each_answer() -> None:
    made = objective("reward")
    batch = made.batch(0)
    _, whole = made.loss(batch)
    assert isinstance(made, RewardModel)
    alone = 0.0
    for row in rows():
        ids = torch.tensor([*row.prompt.tolist(), *row.answers[0].tolist()])
        alone += (made.model.hidden(ids[None])[0, -1] @ made.model.state_dict()["score.weight"][0]).item()
    assert whole["chosen_reward"].item() == pytest.approx(alone, abs=1e-5)
    changed = batch.tokens.clone()
    places = torch.arange(changed.shape[-1])
    changed[places >= batch.extras["lengths"][..., None]] = 60  # another padding
    assert made.loss(replace(batch, tokens=changed))[0]["loss"].item() == made.loss(batch)[0]["loss"].item()


@pytest.mark.parametrize("count", range(2, 7))
def test_no_prompt_meets_its_own_answer(count: int) -> None:
    made = rows(pairs=False)[:count]
    for row, other in zip(made, mismatched(made, 320), strict=True):
        assert row.prompt.tolist() == other.prompt.tolist() and row.answers[0].tolist() != other.answers[0].tolist()
    with pytest.raises(ValueError, match="two answers at least"):
        mismatched(made[:1], 320)


def test_the_kl_of_kto_is_the_mean_of_mismatched_log_ratios() -> None:
    made = objective("kto", 3)
    assert made.prepare(0) == {"kl": 0.0} and made.batch(0).extras["kl"].tolist() == [0.0] * 8
    moved(made)
    old, total, order = decoder(), 0.0, made.data.chosen(1, 0, 8)
    with torch.no_grad():
        for one, two in zip(order, [*order[1:], order[0]], strict=True):
            prompt, answer = rows(False)[one].prompt.tolist(), rows(False)[two].answers[0].tolist()
            ids = torch.tensor([prompt + answer])
            for model, sign in ((made.model, 1), (old, -1)):
                logs = model(ids)[0].log_softmax(-1)
                total += sign * sum(logs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
    assert made.prepare(1)["kl"] == pytest.approx(max(0.0, total / 8), abs=1e-4)
    assert made.validate(2, 0)["val_majority"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="another one's answer"):
        KTO(decoder(), made.data, 1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_the_rows_and_the_totals(kind: str) -> None:
    made = objective(kind)
    made.prepare(0)
    whole, halves = made.batch(0), [made.batch(0, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([half.tokens for half in halves]), whole.tokens)
    assert all(half.totals == whole.totals for half in halves)
    for name, value in whole.extras.items():
        assert torch.equal(torch.cat([half.extras[name] for half in halves]), value)
