"""Log-probabilities of answers, and the reference model that they are compared with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.config.lora import LoRAConfig
from minillama.layers import cross_entropy
from minillama.model import Decoder
from minillama.model.lora import add_lora, lora_parameters
from minillama.training.objectives.answers import answer_log_probabilities
from minillama.training.objectives.reference import REFERENCE, Reference

CONFIG = ModelConfig(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=37, max_seq_len=24, logit_scale=1.5
)


def policy(**changes: object) -> Decoder:
    model = Decoder(replace(CONFIG, **changes))  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)  # distributions that are not flat
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(37, (3, 14), generator=generator)
    return ids[:, :-1], ids[:, 1:], (torch.rand(3, 13, generator=generator) < 0.6).float()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tied", [False, True])
def test_values_entropies_and_gradients_are_those_of_all_logits(
    temperature: float, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "loss_rows", lambda vocabulary, size: 5)  # several chunks
    monkeypatch.setattr(cross_entropy, "CACHED", 80)
    tokens, targets, weights = rows()
    model, plain = policy(tie_embeddings=tied), policy(tie_embeddings=tied)
    pull = torch.randn(3, 13, generator=torch.Generator().manual_seed(1))
    values, entropies = answer_log_probabilities(model, tokens, targets, weights, temperature)
    (values * pull).sum().backward()
    logs = (plain(tokens) / temperature).log_softmax(-1)
    expected = logs.gather(-1, targets[..., None])[..., 0] * weights
    (expected * pull).sum().backward()
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(entropies, -(logs.exp() * logs).sum(-1) * weights, atol=1e-5, rtol=1e-5)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-4)


def test_a_constant_added_to_every_logit_changes_nothing() -> None:
    tokens, targets, weights = rows()
    model = policy()
    before = answer_log_probabilities(model, tokens, targets, weights)
    with torch.no_grad():
        model.output_weight.add_(torch.randn(16, generator=torch.Generator().manual_seed(4)))
    assert (model(tokens).mean(-1).abs() > 1).any()
    torch.testing.assert_close(answer_log_probabilities(model, tokens, targets, weights), before, atol=1e-5, rtol=1e-5)


def test_frozen_weights_and_a_row_without_an_answer() -> None:
    tokens, targets, weights = rows()
    model = add_lora(policy(), LoRAConfig(rank=2))
    weights[1] = 0
    values, _ = answer_log_probabilities(model, tokens, targets, weights)
    values.sum().backward()
    assert not values[1].any() and model.lm_head is not None and model.lm_head.weight.grad is None
    assert all(p.grad is not None for p in lora_parameters(model).values())
    nothing, _ = answer_log_probabilities(model, tokens, targets, torch.zeros_like(weights))
    assert not nothing.any()


def log_probabilities(model: Decoder) -> torch.Tensor:
    return answer_log_probabilities(model, *rows())[0].detach()


@pytest.mark.parametrize("kind", ["whole", "fresh adapter", "trained adapter"])
def test_the_reference_stays_what_the_policy_was(kind: str) -> None:
    model = policy()
    if kind != "whole":
        add_lora(model, LoRAConfig(rank=2, modules_to_save=("lm_head",)), generator=torch.Generator().manual_seed(2))
    if kind == "trained adapter":
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.add_(0.1)
    before = log_probabilities(model)
    reference = Reference(model)
    assert torch.equal(log_probabilities(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any(REFERENCE in name for name in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.requires_grad)
    with reference.of(model) as frozen:
        assert torch.equal(log_probabilities(frozen), before)  # to the bit: the first loss of DPO is ln 2
    assert not torch.equal(log_probabilities(model), before)
    assert set(reference.companions) == (set() if kind == "fresh adapter" else {REFERENCE})
    assert math.isfinite(F.mse_loss(before, log_probabilities(model)).item())
