"""GRPO and PPO on rollouts of a tiny model: ratios, KL, micro-batches, distributions, the arithmetic of whole steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.config.lora import LoRAConfig
from minillama.data.corpus import Corpus, Split
from minillama.data.prompts import Prompt, Prompts
from minillama.data.shards import Shard
from minillama.evaluate.rewards import Scored
from minillama.evaluate.rules import Answer
from minillama.inference.request import Request
from minillama.inference.sampling import Sampler, Sampling
from minillama.model import Decoder
from minillama.model.heads import scores
from minillama.model.lora import add_lora, base_tensors, is_adapter
from minillama.runs.feedback import FeedbackConfig, GRPOConfig, PPOConfig
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.train import byte_tokenizer
from minillama.training.gradients import accumulate
from minillama.training.objectives import ppo, rollouts
from minillama.training.objectives.advantages import kl_estimate
from minillama.training.objectives.grpo import GRPO
from minillama.training.objectives.ppo import PPO
from minillama.training.objectives.rollouts import Feedback

SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=257, max_seq_len=64)
TOKENIZER = byte_tokenizer()
CPU = torch.device("cpu")


class Vowels:
    """Reward: the number of even ids, and not a number for an answer that begins with 13 modulo 16."""

    tokenizer, models = TOKENIZER, {}

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        found = [float(sum(i % 2 == 0 for i in a.ids)) if a.ids[0] % 16 != 13 else math.nan for a in answers]
        return Scored(torch.tensor(found), {"even": torch.tensor(found)})


class Constant:
    """Reward: 1."""

    tokenizer, models = TOKENIZER, {}

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        return Scored(torch.ones(len(answers)), {"one": torch.ones(len(answers))})


def model(seed: int = 2, scale: float = 8.0) -> Decoder:
    """Random weights whose next tokens are far from uniform, and of which some end an answer."""
    made = Decoder(SHAPE)
    made.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.output_weight.mul_(scale)
        made.output_weight[256] *= 2
    return made


def prompts(count: int = 6) -> Prompts:
    """Prompts of 1 to `count` tokens."""
    rows = [Prompt([*range(40, 41 + n)], f"p{n}", {}, Conversation(()), f"file:{n}") for n in range(count)]
    return Prompts(rows, rows[:2], 256, "x")


def objective(settings: FeedbackConfig, rows: int = 8, micro: int = 8, **given: Any) -> Feedback:
    kind = PPO if isinstance(settings, PPOConfig) else GRPO
    return kind(given.pop("model", None) or model(), prompts(), 1, rows, settings, Vowels(), micro, **given)  # type: ignore[arg-type]


GROUPS = [
    GRPOConfig(max_new_tokens=9, samples=4, minibatches=2, epochs=2, kl="k1"),
    GRPOConfig(max_new_tokens=9, samples=4, minibatches=2, kl="k3", average="answers", baseline="mean"),
    GRPOConfig(max_new_tokens=9, samples=4, kl="k2", average="length", baseline="leave-one-out", temperature=0.7),
]
ACTORS = [
    PPOConfig(max_new_tokens=9, minibatches=2, epochs=2),
    PPOConfig(max_new_tokens=9, minibatches=2, critic="shared", samples=2, temperature=1.3),
    PPOConfig(max_new_tokens=9, minibatches=1, epochs=1, kl="k3"),
]


def losses(made: Feedback, step: int, micro: int = 8) -> tuple[dict[str, float], dict[str, float]]:
    found = accumulate(made, made.batch(step), micro, CPU)
    return dict(found.terms), dict(found.metrics)


@pytest.mark.parametrize("settings", [*GROUPS, *ACTORS])
@pytest.mark.parametrize("micro", [8, 3])
def test_the_first_ratios_are_exactly_1_and_the_first_kl_is_0(settings: FeedbackConfig, micro: int) -> None:
    made = objective(settings, micro=micro)
    recorded = made.prepare(0)
    terms, metrics = losses(made, 0, micro)
    batch = made.batch(0)
    parts, weights = batch.extras, batch.weights
    assert terms["policy"] == pytest.approx(
        -(parts["advantages"] * weights).sum().item() / batch.totals["policy"], abs=1e-6
    )
    assert metrics["clipped"] == 0 and metrics.get("approx_kl", 0) == 0 and 0 < metrics["entropy"] < math.log(257)
    assert {**recorded, **metrics}["kl"] == 0 and terms.get("kl_penalty", 0) == 0
    assert recorded["rollout_tokens"] >= made.buffer["mask"].sum() > 0
    if "old" in parts:
        assert torch.equal(parts["old"], parts["reference"]) and parts["old"][parts["mask"]].max() < 0
    lengths = parts["mask"].sum(1)
    assert 4 < lengths.float().mean() <= 9
    assert len(set(lengths.tolist())) > 1 or settings.temperature == 1.3


def moved(made: Feedback, by: float) -> Decoder:
    """The model, whose weights are changed; a copy as it was."""
    before = copy.deepcopy(made.model)
    with torch.no_grad():
        for weight in made.model.parameters():
            weight.add_(by * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return before


@pytest.mark.parametrize("settings", [*GROUPS, *ACTORS])
def test_micro_batches_change_nothing(settings: FeedbackConfig) -> None:
    found = []
    for micro in (8, 4, 2, 1):
        made = objective(settings, micro=micro)
        made.prepare(0)
        moved(made, 0.05)  # so that no ratio is 1
        terms, metrics = losses(made, 0, micro)
        grads = {
            f"{k}/{n}": p.grad for k, m in made.models.items() for n, p in m.named_parameters() if p.grad is not None
        }
        found.append((terms, metrics, grads))
    first_terms, first_metrics, first = found[0]
    assert first_metrics.get("approx_kl", 1) > 1e-4 and len(first) > 18
    for terms, metrics, grads in found[1:]:
        assert terms == pytest.approx(first_terms, abs=1e-5) and metrics == pytest.approx(first_metrics, abs=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, first[name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_values_are_of_the_states_in_which_the_tokens_were_chosen(critic: str) -> None:
    """Of a prompt of P tokens the first is that of token P - 1, which chooses the first token of the answer."""
    made = objective(PPOConfig(max_new_tokens=9, minibatches=1, critic=critic))  # type: ignore[arg-type]
    value, generator = made.models["value"], torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in value.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    made.prepare(0)
    rows, asked = made.buffer, made.data.batch(1, 0, 8)
    for prompt, tokens, mask, values in zip(asked, *(rows[n] for n in ("tokens", "mask", "values")), strict=True):
        places = mask.nonzero()[:, 0].tolist()
        if not places:
            continue  # an answer that no reward could score
        assert places[0] == len(prompt.ids) - 1 and tokens[: len(prompt.ids)].tolist() == prompt.ids
        ids = tokens[None, : places[-1] + 1]
        with torch.no_grad():
            found = scores(value, ids) if isinstance(value, Decoder) else value(made.model.hidden(ids))[..., 0]
        torch.testing.assert_close(values[mask], found[0, places], atol=1e-5, rtol=1e-5)
        assert found[0].std() > 0.01


def test_a_share_of_text_is_a_mean_over_its_own_tokens() -> None:
    text = np.random.default_rng(2).integers(0, 257, 2000)
    splits = [Split([Shard(Path("x"), text.astype(np.uint16))], 257, 2000, "test")]
    corpus, settings = Corpus(splits, splits, None), PPOConfig(max_new_tokens=9, text_weight=0.5)
    for micro in (8, 3):
        made = objective(settings, micro=micro, text=corpus, context=12)
        made.prepare(0)
        ids = made.batch(0).extras["text"]
        with torch.no_grad():
            expected = F.cross_entropy(made.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        assert ids.shape == (8, 13) and losses(made, 0, micro)[0]["text"] == pytest.approx(0.5 * expected.item())


def test_an_end_token_with_the_id_of_padding_is_of_the_answer() -> None:
    made, given = objective(GROUPS[1]), ([5, 0], [0], [7, 8, 9])
    rows = made._rows(made.data.train[:3], [Request([1], 9, tokens=tokens) for tokens in given])
    assert [row[mask].tolist() for row, mask in zip(rows["targets"], rows["mask"], strict=True)] == list(given)


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_the_trained_distribution_is_the_sampled_one(temperature: float) -> None:
    made = objective(GRPOConfig(max_new_tokens=9, samples=4, minibatches=2, temperature=temperature))
    made.prepare(0)
    rows = made.buffer
    ratios = []
    for tokens, targets, mask, old in zip(*(rows[n] for n in ("tokens", "targets", "mask", "old")), strict=True):
        with torch.no_grad():
            logits = made.model(tokens[None])[0]
        for t in mask.nonzero()[:, 0].tolist():
            sampler = Sampler(Sampling(temperature), [], 257, 0)
            ratios.append(old[t].exp() / sampler.probabilities(logits[t])[targets[t]])
    assert len(ratios) > 50 and torch.stack(ratios).mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_what_is_sampled_comes_from_the_trained_distribution(temperature: float) -> None:
    """The mean log-probability of samples is minus the entropy, whatever sampling the model asks for by itself."""
    settings = GRPOConfig(max_new_tokens=1, samples=1024, minibatches=2, temperature=temperature)
    made = objective(settings, rows=1024, micro=1024)
    made.model.sampling = {"top_k": 2, "temperature": 0.1}
    made.data.train[:] = made.data.train[:1]  # type: ignore[index]
    made.rewards = Constant()  # type: ignore[assignment]
    made.prepare(0)
    with torch.no_grad():
        exact = (made.model(torch.tensor([made.data.train[0].ids]))[0, -1] / temperature).log_softmax(0)
    found = made.buffer["old"][made.buffer["mask"]]
    assert len(found) == 2048
    assert abs(found.mean().item() - (exact.exp() * exact).sum().item()) < 4 * found.std().item() / 2048**0.5


def test_kl_estimates_of_samples_are_those_of_the_distributions() -> None:
    made = objective(GRPOConfig(max_new_tokens=1, samples=2048, minibatches=2, kl="k1"), rows=2048, micro=2048)
    with torch.no_grad():
        made.model.output_weight.mul_(1.2)
    made.data.train[:] = made.data.train[:1]  # type: ignore[index]
    made.rewards = Constant()  # type: ignore[assignment]
    made.prepare(0)
    with torch.no_grad():
        ids = torch.tensor([made.data.train[0].ids])
        p, q = (m(ids)[0, -1].log_softmax(0) for m in (made.model, made.companions["reference"]))
    exact = (p.exp() * (p - q)).sum().item()
    mask = made.buffer["mask"]
    for kind in ("k3", "k1"):
        samples = kl_estimate(made.buffer["old"], made.buffer["reference"], kind)[mask]  # type: ignore[arg-type]
        assert len(samples) == 4096
        assert abs(samples.mean().item() - exact) < 4 * samples.std().item() / 64
    assert made.recent["kl"] == pytest.approx(samples.mean().item())


def test_rows_are_padded_by_less_than_an_eighth_to_few_lengths() -> None:
    model = Decoder(SHAPE)
    widths = {used: rollouts._width(used, model) for used in range(1, 512)}
    assert all(used <= width < used * 9 / 8 for used, width in widths.items())
    assert len({width for width in widths.values() if 64 <= width < 512}) == (512 - 64) / 8
    assert sorted(widths.values()) == [*widths.values()] and rollouts._width(0, model) == 1
    model.blocks[0].compile()  # which wants few shapes
    assert {rollouts._width(used, model) for used in range(1, 65)} == {1, 2, 3, 4, 5, 6, 7, *range(8, 65, 8)}


def test_samples_differ_and_repeat_by_seed_and_step() -> None:
    def rollout(made: Feedback, number: int) -> Tensor:
        made.prepare(number)
        return made.buffer["targets"] * made.buffer["mask"]

    settings = GRPOConfig(max_new_tokens=9, samples=64)
    made = objective(settings, rows=64)
    made.rewards = Constant()  # type: ignore[assignment]
    first, second = rollout(made, 0), rollout(made, 1)
    assert len({tuple(row) for row in first.tolist()}) > 60
    assert first.shape != second.shape or not torch.equal(first, second)
    again = objective(settings, rows=64)
    again.rewards = Constant()  # type: ignore[assignment]
    assert torch.equal(rollout(again, 0), first)


def test_an_epoch_trains_on_every_answer_once() -> None:
    made = objective(GROUPS[0])
    made.prepare(0)
    whole = sorted(map(tuple, made.buffer["tokens"].tolist()))
    for epoch in range(2):
        parts = [made.batch(2 * epoch + part).tokens for part in range(2)]
        assert sorted(map(tuple, torch.cat(parts).tolist())) == whole
    assert not torch.equal(made.batch(0).tokens, made.batch(2).tokens)
    halves = [made.batch(1, rank, 2).tokens for rank in range(2)]
    assert torch.equal(torch.cat(halves), made.batch(1).tokens)
    assert made.where(0, [0, 7])[0].startswith("file:") and len(set(made.where(0, [*range(8)]))) > 1


def test_an_adapter_is_its_own_reference_and_its_base_stays() -> None:
    adapted = add_lora(model(), LoRAConfig(rank=2), generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in base_tensors(adapted).items()}
    made = objective(GRPOConfig(max_new_tokens=9, samples=4, kl="k3"), model=adapted)
    made.prepare(0)
    terms, metrics = losses(made, 0)
    assert not made.companions and metrics["kl"] == 0 == terms["kl_penalty"]
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if is_adapter(name) and "lora_B" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    made.prepare(1)
    assert losses(made, 1)[0]["kl_penalty"] > 0
    tokens = made.buffer["tokens"][:1]
    decoded = made._copy.refresh()  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(decoded(tokens), adapted(tokens), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(adapted).items())


def test_the_adaptive_coefficient_reads_the_kl_that_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per answer that could be scored."""
    made = objective(PPOConfig(max_new_tokens=9, samples=8, kl_target=1e6, kl_horizon=1e9, beta=0.2), rows=64)
    moved(made, 0.05)
    targets: list[float] = []
    monkeypatch.setattr(ppo, "adapted_beta", lambda beta, kl, *rest: targets.append(kl) or beta)
    recorded = made.prepare(0)
    assert 0 < recorded["scored"] < 1 and targets == [recorded["kl"]]


def test_nothing_is_explained_of_returns_that_are_equal() -> None:
    settings = PPOConfig(max_new_tokens=9, kl="none", lam=1.0, minibatches=1)
    made = PPO(model(), prompts(), 1, 8, settings, Constant(), 8)  # type: ignore[arg-type]
    assert "value_explained" not in made.prepare(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_that_of_the_float32_weights_after_each_update(dtype: torch.dtype) -> None:
    master = model()
    made = objective(PPOConfig(max_new_tokens=3, average_decay=0.9), model=master)
    expected = {name: weight.clone() for name, weight in master.state_dict().items()}
    made.models = {**made.models, "model": copy.deepcopy(master).to(dtype)}  # the working copy
    for step in range(3):
        with torch.no_grad():
            for weight in master.parameters():
                weight.add_(1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))
        made.updated({"model": master})
        expected = {name: 0.9 * was + 0.1 * master.state_dict()[name] for name, was in expected.items()}
    found = made.state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(found[f"average/{name}"], weight, atol=1e-6, rtol=1e-6)


def test_the_coefficient_of_the_kl_adapts() -> None:
    made = objective(PPOConfig(max_new_tokens=9, kl_target=6.0, kl_horizon=100, beta=0.2))
    assert made.prepare(0)["beta"] == pytest.approx(0.2)
    assert made.prepare(4)["beta"] == pytest.approx(0.2 * (1 - 0.2 * 8 / 100))  # KL 0 is under the target
    state = made.state_dict()
    again = objective(PPOConfig(max_new_tokens=9, kl_target=6.0, kl_horizon=100, beta=0.2))
    again.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    assert again.state_dict().keys() == state.keys() and torch.equal(again.beta, made.beta)  # type: ignore[attr-defined]
