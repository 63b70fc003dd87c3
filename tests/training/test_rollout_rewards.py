"""Rewards, prompts and warnings of rollouts: what cannot be scored, what has no signal, what is taken for training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minillama.errors import InputError
from minillama.evaluate.rewards import Scored
from minillama.evaluate.rules import Answer
from minillama.model import Decoder
from minillama.runs.feedback import FeedbackConfig, GRPOConfig, PPOConfig
from minillama.training.objectives import rollouts
from minillama.training.whole_weights import whole_weights

from .test_rollouts import ACTORS, GROUPS, Constant, Vowels, losses, objective


@pytest.mark.parametrize("settings", [GROUPS[0], ACTORS[0]])
def test_the_weights_are_gathered_once_per_rollout(settings: FeedbackConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, too: those of a divided model come from all processes."""
    made, gathered = objective(settings), list[Decoder]()

    def count(model: Decoder) -> Mapping[str, Tensor]:
        gathered.append(model)
        return whole_weights(model)

    monkeypatch.setattr(rollouts, "whole_weights", count)
    made.prepare(0)
    assert len(gathered) == 1
    made.validate(8, 0)
    made.prepare(1)  # of the same rollout
    assert len(gathered) == 2
    with torch.no_grad():
        made.model.output_weight.mul_(2)
    made.prepare(settings.updates)
    assert len(gathered) == 3
    assert torch.equal(made._copy.model.output_weight, made.model.output_weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [PPOConfig(max_new_tokens=9, samples=8), GRPOConfig(max_new_tokens=9, kl="k3")])
def test_an_answer_that_cannot_be_scored_teaches_nothing(settings: FeedbackConfig) -> None:
    made = objective(settings, rows=64)
    made.prepare(0)
    empty = ~made.buffer["mask"].any(1)
    assert 0 < empty.sum() < 20
    terms, _ = losses(made, 0)
    assert all(math.isfinite(value) for value in terms.values())


def test_validation_and_its_warnings() -> None:
    made = objective(GRPOConfig(max_new_tokens=9, samples=4, kl="k1"))
    measures = made.validate(8, 0)
    assert made.best == ("val_reward", "max") and {"val_reward", "val_reward_even", "val_ended"} <= measures.keys()
    assert made.sample["question"] in ("p0", "p1") and made.sample["reward"] == made.sample["rewards"]["even"]
    assert measures == made.validate(8, 0)
    made.prepare(0)
    made.recent["scored"] = 1.0
    assert made.warnings(measures) == []
    made.recent |= {"kl": 21.0, "distinct_2": 0.4 * made.first_distinct.item(), "scored": 0.75}
    made.flat = 10
    again = objective(GRPOConfig(max_new_tokens=9, samples=4, kl="k1"))  # resumed
    again.load_state_dict(made.state_dict())
    assert again.buffer.keys() == made.buffer.keys() and again.state_dict().keys() == made.state_dict().keys()
    for one in (made, again):
        scored, flat, kl, repeats = one.warnings(measures)
        assert "25% of the answers cannot be scored" in scored and "in 10 rollouts" in flat
        assert "21.0 nats" in kl and "raise objective.beta" in kl and "40%" in repeats


def test_samples_are_of_several_questions() -> None:
    made, found = objective(GRPOConfig(max_new_tokens=9, samples=4)), set()
    for made.step in range(8):
        made.validate(8, 0)
        found.add(made.sample["question"])
    assert found == {"p0", "p1"}


def test_rollouts_without_a_signal_are_counted() -> None:
    made = objective(GRPOConfig(max_new_tokens=9, samples=4))
    made.rewards = Constant()  # type: ignore[assignment]
    assert [made.prepare(step)["groups_with_signal"] for step in range(3)] == [0, 0, 0] and made.flat == 3
    made.rewards = Vowels()  # type: ignore[assignment]
    made.prepare(3)
    assert made.flat == 0


class OddPrompts(Constant):
    """Reward: the number of even ids of an answer to a prompt of an odd number of tokens, else 1."""

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        found = [float(sum(i % 2 == 0 for i in a.ids)) if int(a.prompt[1:]) % 2 else 1.0 for a in answers]
        return Scored(torch.tensor(found), {"odd": torch.tensor(found)})


@pytest.mark.parametrize("kind", [GRPOConfig, PPOConfig])
def test_of_more_prompts_those_whose_answers_differ_are_taken_first(kind: type[GRPOConfig] | type[PPOConfig]) -> None:
    """DAPO's dynamic sampling: six prompts of which two are trained on, then four of which three have a signal."""
    for rows, oversample, with_signal in ((8, 3, 2), (16, 2, 3)):
        settings = kind(max_new_tokens=9, samples=4, oversample=oversample, kl="none")
        if isinstance(settings, PPOConfig):
            settings = replace(settings, critic="shared", lam=1.0)  # whose values are 0 at first
        made = objective(settings, rows)
        made.rewards = OddPrompts()  # type: ignore[assignment]
        measures = made.prepare(0)
        found = [int(where.removeprefix("file:")) for where in made.where(0, range(rows))]
        lengths = [int(row.nonzero()[0]) + 1 for row in made.batch(0).extras["mask"]]
        assert lengths == [number + 1 for number in found]  # the row is of the prompt that it is said to be of
        drawn = [int(prompt.where.removeprefix("file:")) for prompt in made.data.batch(1, 0, rows // 4 * oversample)]
        odd = [number for number in drawn if number % 2][: rows // 4]
        assert {number for number in found if number % 2} == {*odd} and len(odd) == with_signal
        assert measures["groups_with_signal"] == len(odd) / (rows // 4)
        if kind is PPOConfig:  # without discount, values and KL each token returns the reward of its answer
            mask, targets, returns = (made.buffer[name] for name in ("mask", "targets", "returns"))
            numbers = [
                int(made.data.batch(1, 0, rows // 4 * oversample)[row // 4].where.removeprefix("file:"))
                for row in made.buffer["chosen"].tolist()
            ]
            for row, number in enumerate(numbers):
                even = (targets[row][mask[row]] % 2 == 0).sum()
                assert (returns[row][mask[row]] == (even if number % 2 else 1)).all()
        else:
            expected = made.buffer["advantages"].view(rows // 4, 4, -1)
            assert (expected[: len(odd)] != 0).any((1, 2)).all() and (expected[len(odd) :] == 0).all()
        again = objective(settings, rows)
        again.load_state_dict(made.state_dict())
        assert again.where(0, range(rows)) == made.where(0, range(rows))


@pytest.mark.filterwarnings("error")
def test_a_later_rollout_that_cannot_be_scored_teaches_nothing() -> None:
    class Nothing(Constant):
        def __call__(self, answers: Sequence[Answer]) -> Scored:
            none = torch.full((len(answers),), math.nan)
            return Scored(none, {"none": none})

    made = objective(PPOConfig(max_new_tokens=9, minibatches=1, kl_target=1.0))
    made.rewards = Nothing()  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"no answer of the first rollout[\s\S]*nothing from none for file:"):
        made.prepare(0)
    made.rewards = Vowels()  # type: ignore[assignment]
    made.prepare(0)
    made.rewards = Nothing()  # type: ignore[assignment]
    assert made.prepare(4)["scored"] == 0 and set(losses(made, 4)[0].values()) == {0.0}
