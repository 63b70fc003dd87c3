"""Learning rates, parameter groups, and the optimizer's state by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minillama.config import ModelConfig
from minillama.layers.cross_entropy import cross_entropy
from minillama.model import Decoder
from minillama.runs.sections import OptimConfig
from minillama.training.optim.adafactor import Adafactor
from minillama.training.optim.groups import (
    change_settings,
    load_optimizer_state,
    make_optimizers,
    optimizer_state,
    parameter_groups,
)
from minillama.training.optim.muon import Muon, orthogonalize
from minillama.training.optim.schedule import learning_rate

LLAMA = OptimConfig(lr=3e-4, warmup_steps=2000, schedule="cosine", final_fraction=0.1)
MODEL = ModelConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=40, max_seq_len=16)


@pytest.mark.parametrize(("step", "rate"), [(0, 0), (1000, 1.5e-4), (2000, 3e-4), (126000, 1.65e-4), (250000, 3e-5)])
def test_llamas_schedule(step: int, rate: float) -> None:
    assert learning_rate(LLAMA, step, 250_000) == pytest.approx(rate, rel=1e-9)


def test_wsd_is_flat_and_then_a_line() -> None:
    wsd = replace(LLAMA, schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    rates = [learning_rate(wsd, step, 100) / 3e-4 for step in (5, 10, 50, 80, 90, 100)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.55, 0.1])


def test_warmup_is_cut_to_the_run() -> None:
    assert learning_rate(LLAMA, 50, 100) == pytest.approx(1.5e-4)
    assert learning_rate(LLAMA, 100, 100) == pytest.approx(3e-4)
    assert learning_rate(replace(LLAMA, warmup_steps=0, schedule="constant"), 1, 10) == 3e-4


def names(group: dict) -> set[str]:
    return {name for name, _ in group["params"]}


def test_norms_and_embeddings_do_not_decay() -> None:
    decay, kept = parameter_groups(Decoder(MODEL), OptimConfig(weight_decay=0.3))
    assert decay["weight_decay"] == 0.3 and kept["weight_decay"] == 0
    assert "model.layers.1.mlp.down_proj.weight" in names(decay) and "lm_head.weight" in names(decay)
    expected = {n for n in MODEL.tensors() if "norm" in n} | {"model.embed_tokens.weight"}
    assert names(kept) == expected
    decay, kept = parameter_groups(Decoder(MODEL), OptimConfig(decay_embeddings=True))
    assert "model.embed_tokens.weight" in names(decay)
    assert names(decay) | names(kept) == set(MODEL.tensors())


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(lr=0.01, muon_lr=0.0),
        OptimConfig(lr=0.01, muon_lr=0.05),
        OptimConfig(optimizer="adafactor", lr=0.01),
    ],
    ids=["adamw", "muon", "adafactor"],
)
def test_a_second_model_learns_at_a_multiple_of_the_rate(config: OptimConfig) -> None:
    models = {"model": Decoder(MODEL), "value": Decoder(MODEL)}
    optimizers = make_optimizers(models, config, rates={"value": 4.0})
    for _ in range(2):
        of = {name: g["lr_scale"] for o in optimizers for g in o.param_groups for name in g["param_names"]}
        assert of.keys() == {prefix + name for name in MODEL.tensors() for prefix in ("", "value/")}
        assert all(of[f"value/{name}"] == 4 * of[name] for name in MODEL.tensors())
        assert of["model.norm.weight"] == 1
        change_settings(optimizers, replace(config, weight_decay=0.5))  # of another stage
    for group in (g for o in optimizers for g in o.param_groups if g.get("name") in ("decay", "muon")):
        expected = 0.5 * (config.muon_lr / config.lr if group["name"] == "muon" else 1)
        assert group["lr_scale"] * group["weight_decay"] == pytest.approx(expected)


def test_adafactor_decays_all_models_alike() -> None:
    models = {name: torch.nn.Linear(3, 2, bias=False) for name in ("model", "value")}
    (optimizer,) = make_optimizers(models, OptimConfig(optimizer="adafactor", lr=0.1), rates={"value": 5.0})
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_scale"]
    before = {name: model.weight.detach().clone() for name, model in models.items()}
    for model in models.values():
        model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    for name, model in models.items():
        assert torch.allclose(model.weight, before[name] * (1 - 0.01))


def test_decay_moves_matrices_alone() -> None:
    model = Decoder(MODEL)
    (optimizer,) = make_optimizers(model, OptimConfig(lr=0.1, weight_decay=0.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in model.named_parameters():
        factor = 1.0 if "norm" in n or "embed" in n else 1 - 0.1 * 0.5
        torch.testing.assert_close(p, before[n] * factor)


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_state_comes_back_by_name(muon_lr: float) -> None:
    torch.manual_seed(0)
    a, b = Decoder(MODEL), Decoder(MODEL)
    b.load_state_dict(a.state_dict())
    first, second = (make_optimizers(m, OptimConfig(muon_lr=muon_lr)) for m in (a, b))
    assert len(first) == (2 if muon_lr else 1)
    ids = torch.randint(0, 40, (2, 9))

    def step(model: Decoder, optimizers: list[torch.optim.Optimizer]) -> None:
        model(ids).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step(a, first)
    b.load_state_dict(a.state_dict())
    state = optimizer_state(first)
    assert "model.norm.weight/exp_avg_sq" in state and "lm_head.weight/step" in state
    load_optimizer_state(second, {n: t.clone() for n, t in state.items()})
    step(a, first)
    step(b, second)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_muon_is_torchs(shape: tuple[int, int]) -> None:
    """With products in bfloat16 to the bit; in float32 to bfloat16's precision."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    theirs, mine, exact = (torch.nn.Parameter(start.clone()) for _ in range(3))
    optimizers = [
        torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1),
        Muon([mine], lr=0.05, weight_decay=0.1, dtype=torch.bfloat16),
        Muon([exact], lr=0.05, weight_decay=0.1),
    ]
    for _ in range(4):
        grad = torch.randn(shape)
        for parameter, optimizer in zip((theirs, mine, exact), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    assert torch.equal(theirs, mine)
    assert (exact - mine).norm() < 0.02 * (mine - start).norm()


def test_muons_updates_are_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(40, 12)))
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_muon_of_many_matrices_is_muon_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillama.training.optim.muon.BATCH", 250)
    torch.manual_seed(4)
    shapes = [(12, 7), (9, 9), (12, 7), (7, 12), (12, 7), (12, 7)]
    together = [torch.randn(shape) for shape in shapes]
    alone = [matrix.clone() for matrix in together]
    optimizers = [Muon(together), *(Muon([matrix]) for matrix in alone)]
    for _ in range(3):
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(("step", "rate"), [(1, 1e-2), (10_000, 1e-2), (40_000, 0.005), (250_000, 0.002)])
def test_palms_schedule(step: int, rate: float) -> None:
    assert learning_rate(OptimConfig(lr=1e-2, schedule="rsqrt"), step, 10**6) == pytest.approx(rate)


def test_adafactor_is_torchs_on_vectors_without_momentum() -> None:
    torch.manual_seed(0)
    start = torch.randn(40)
    theirs, mine = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [torch.optim.Adafactor([theirs], lr=1e-2), Adafactor([mine], lr=1e-2, beta1=0.0, decay=False)]
    for _ in range(6):
        grad = torch.randn(40)
        for parameter, optimizer in zip((theirs, mine), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(mine, theirs)
    assert not torch.equal(mine, start)


def test_adafactors_step_by_hand() -> None:
    """beta2 = 1 - k^-0.8 is 0 at the first step and 0.8415107 at the tenth; a step is lr times the weight's RMS."""
    weight = torch.nn.Parameter(torch.full((2, 3), 2.0))
    optimizer = Adafactor([weight], lr=0.01, beta1=0.9)
    weight.grad = torch.full((2, 3), 5.0)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((2, 3), 2 * (1 - 1e-4) - 0.01 * 2.0 * 0.1))
    for _ in range(8):
        optimizer.step()
    before = optimizer.state[weight]["variance"].clone()
    weight.grad = torch.zeros(2, 3)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["variance"], before * 0.8415107)


def test_palms_recipe_trains_and_its_state_comes_back() -> None:
    palm = replace(MODEL, norm="layer-scale", parallel_block=True, tie_embeddings=True, init="fan-in", logit_scale=0.25)
    config = OptimConfig(optimizer="adafactor", lr=1e-2, schedule="rsqrt")
    torch.manual_seed(0)
    model, ids = Decoder(palm), torch.randint(0, 40, (4, 12))
    (optimizer,) = make_optimizers(model, config)
    losses = []
    for _ in range(30):
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:], z_loss=1e-4) / 44
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    state = optimizer_state([optimizer])
    assert {name.rpartition("/")[2] for name in state} == {"step", "variance", "mean"}
    (other,) = make_optimizers(model, config)
    load_optimizer_state([other], {n: t.clone() for n, t in state.items()})
    assert all(torch.equal(t, state[n]) for n, t in optimizer_state([other]).items())


def test_the_z_loss_is_its_formula() -> None:
    logits, targets, weights = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3)), torch.rand(2, 3)
    z = logits.exp().sum(-1).log()
    expected = (weights * (z - logits.gather(-1, targets[..., None])[..., 0] + 0.1 * z**2)).sum()
    torch.testing.assert_close(cross_entropy(logits, targets, weights, 0.1), expected)
