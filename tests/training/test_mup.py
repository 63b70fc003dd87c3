"""Maximal update parametrization: its table, the standard one at the base width, the coordinate check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from minillama.config import ModelConfig
from minillama.config.mup import Mup
from minillama.errors import InputError
from minillama.model import Decoder
from minillama.runs.config import RunConfig
from minillama.runs.report import PlainReport
from minillama.runs.sections import OptimConfig
from minillama.training.coordinate_check import changes, slope
from minillama.training.init_model import resolve
from minillama.training.optim.groups import change_settings, make_optimizers, parameter_groups
from minillama.training.run import train

WIDTHS = (32, 64, 128)


def config(dim: int, base: int = 32, head: int = 16, **optim: float) -> RunConfig:
    model = ModelConfig(
        dim=dim, n_layers=2, n_heads=dim // head, head_dim=head, hidden_dim=5 * dim // 2, vocab_size=64, max_seq_len=32
    )
    settings = OptimConfig(mup_base_dim=base, mup_base_head_dim=16 if base else 0, **optim)  # type: ignore[arg-type]
    return RunConfig(model=model, optim=settings)


def rates(optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple[float, float]]:
    """Parameter -> (learning rate relative to the schedule's, weight decay)."""
    return {
        name: (group["lr_scale"], group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_table_3() -> None:
    """arXiv 2203.03466, at four times the width and with heads of four times the width."""
    run = config(128, head=64, weight_decay=0.1)
    assert run.mup == Mup(4, 4)
    model = Decoder(run.model)
    model.init_weights(torch.Generator().manual_seed(0), run.mup)
    found = rates(make_optimizers(model, run.optim, run.mup))
    expected = {
        "model.embed_tokens.weight": (0.02, 1, 0),
        "lm_head.weight": (0.02 / 4, 1 / 4, 0.4),
        "model.layers.1.self_attn.q_proj.weight": (0.02 / 4, 1 / 8, 0.8),
        "model.layers.1.self_attn.k_proj.weight": (0.02 / 2, 1 / 4, 0.4),
        "model.layers.1.mlp.up_proj.weight": (0.02 / 2, 1 / 4, 0.4),
        "model.layers.1.mlp.down_proj.weight": (0.02 / 2 / 2, 1 / 4, 0.4),  # and 1 / sqrt(2 layers)
        "model.layers.1.self_attn.o_proj.weight": (0.02 / 2 / 2, 1 / 4, 0.4),
    }
    parameters = dict(model.named_parameters())
    for name, (std, rate, decay) in expected.items():
        assert parameters[name].std().item() == pytest.approx(std, rel=0.05), name
        assert found[name] == pytest.approx((rate, decay)), name
    assert found["model.norm.weight"] == (1, 0) and set(found) == set(parameters)
    for name, (rate, decay) in found.items():
        assert not decay or rate * decay == pytest.approx(0.1), name


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_the_base_width_is_the_standard_parametrization(muon_lr: float) -> None:
    runs = [config(32, base, muon_lr=muon_lr, decay_embeddings=True) for base in (32, 0)]
    models = [Decoder(run.model) for run in runs]
    for model, run in zip(models, runs, strict=True):
        model.init_weights(torch.Generator().manual_seed(3), run.mup)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    found = [rates(make_optimizers(model, run.optim, run.mup)) for model, run in zip(models, runs, strict=True)]
    assert found[0] == found[1] == rates(make_optimizers(models[1], runs[1].optim))


def test_muon_needs_the_queries_factor_alone() -> None:
    run = config(128, head=64, muon_lr=0.02, lr=0.01)
    found = rates(make_optimizers(Decoder(run.model), run.optim, run.mup))
    assert found["model.layers.0.mlp.up_proj.weight"] == pytest.approx((2, 0.1))
    assert found["model.layers.0.self_attn.q_proj.weight"] == pytest.approx((1, 0.2))
    assert found["lm_head.weight"] == pytest.approx((1 / 4, 0.4))


def test_embeddings_that_decay_keep_their_rate() -> None:
    run = config(128, decay_embeddings=True)
    found = rates(make_optimizers(Decoder(run.model), run.optim, run.mup))
    assert found["model.embed_tokens.weight"] == (1, 0.1)


def test_a_stages_weight_decay_is_scaled_too() -> None:
    run = config(128, muon_lr=0.02)
    optimizers = make_optimizers(Decoder(run.model), run.optim, run.mup)
    change_settings(optimizers, replace(run.optim, weight_decay=0.02, muon_lr=0.04))
    found = rates(optimizers)
    assert found["lm_head.weight"] == pytest.approx((1 / 4, 0.08)) and found["model.norm.weight"] == (1, 0)
    assert found["model.layers.0.mlp.up_proj.weight"] == pytest.approx((0.04 / run.optim.lr, 0.02))


def sizes(make: Callable[[int], RunConfig]) -> dict[str, float]:
    """Exponents of the activations' change over the width after four steps, averaged over two seeds."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 64, (4, 33), generator=generator)] * 4
    found = [[changes(make(width), rows, seed) for seed in range(2)] for width in WIDTHS]
    return {
        name: slope(WIDTHS, [sum(one[name] for one in seeds) / len(seeds) for seeds in found]) for name in found[0][0]
    }


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_coordinate_check(muon_lr: float) -> None:
    """Of one learning rate: activations change alike at all widths with muP, and more the wider without."""
    standard = sizes(lambda width: config(width, 0, lr=1e-2, muon_lr=muon_lr))
    mup = sizes(lambda width: config(width, lr=1e-2, muon_lr=muon_lr))
    grown = sizes(lambda width: config(width, head=width // 2, lr=1e-2, muon_lr=muon_lr))
    for found in (mup, grown):
        assert all(abs(exponent) < 0.25 for exponent in found.values()), found
    assert standard["logits"] > 0.5 and standard["self_attn"] > 0.6 and standard["mlp"] > 0.8


def test_heads_that_widen_need_the_queries_factor() -> None:
    """Scores of queries and keys that are aligned grow with E / sqrt(E); muP's stay."""
    scores = {}
    for factor in (True, False):
        found = []
        for head in (16, 64, 256):
            mup = Mup(head / 16, head / 16 if factor else 1)
            model = Decoder(config(2 * head, head=head).model)
            model.init_weights(torch.Generator().manual_seed(0), mup)
            attention = model.blocks[0].self_attn
            with torch.no_grad():  # as training aligns them
                attention.k_proj.weight.copy_(attention.q_proj.weight / mup.queries("q_proj.weight"))
                x = torch.randn(1, 40, 2 * head, generator=torch.Generator().manual_seed(1))
                q, k, _ = attention.heads(x, None)
            found.append((q * k).sum(-1).mean().item() / head**0.5)
        scores[factor] = slope((16, 64, 256), found)
    assert scores[True] == pytest.approx(0, abs=0.05) and scores[False] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("model", "optim", "where"),
    [
        ({"init": "fan-in"}, {}, "model.init"),
        ({}, {"optimizer": "adafactor"}, "optim.optimizer"),
        ({"tie_embeddings": True}, {}, "model.tie_embeddings"),
        ({"init": "rwkv", "mixer": "wkv", "mlp": "channel-mix", "position": "none"}, {}, "model.init|model.mixer"),
    ],
)
def test_what_has_no_rule_is_refused(model: dict[str, object], optim: dict[str, object], where: str) -> None:
    shape = replace(config(64, 0).model, **model)  # type: ignore[arg-type]
    RunConfig(model=shape, optim=OptimConfig(**optim))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=where):
        RunConfig(model=shape, optim=OptimConfig(mup_base_dim=32, **optim))  # type: ignore[arg-type]


def test_a_tied_head_takes_its_factor_from_the_logits_scale() -> None:
    shape = replace(config(64, 0).model, tie_embeddings=True, logit_scale=0.5)
    run = RunConfig(model=shape, optim=OptimConfig(mup_base_dim=32))
    found = rates(make_optimizers(Decoder(shape), run.optim, run.mup))
    assert found["model.embed_tokens.weight"] == (1, 0)


def test_a_run_is_initialized_and_updated_by_it(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Adam's first step moves every weight that has a gradient by its learning rate."""
    words = ["--train.steps", "1", "--optim.mup_base_dim", "8", "--optim.weight_decay", "0", "--optim.lr", "1e-2"]
    run = tiny_config(*words, "--optim.eps", "1e-20", "--optim.grad_clip", "0")
    before = resolve(run).build_model().state_dict()
    train(run, str(tmp_path / "run"), report=PlainReport(Console(quiet=True)))
    after = Decoder.from_pretrained(tmp_path / "run/model").state_dict()
    for name, factor in (("lm_head", 1 / 4), ("model.layers.0.mlp.up_proj", 1 / 4), ("model.embed_tokens", 1)):
        moved = (after[f"{name}.weight"] - before[f"{name}.weight"]).abs()
        assert moved.max().item() == pytest.approx(1e-2 * factor, rel=1e-3), name
    assert before["lm_head.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert run.mup == Mup(4, 1)


def test_groups_without_mup_are_the_two_of_before() -> None:
    model = Decoder(config(64, 0).model)
    (adamw,) = make_optimizers(model, OptimConfig())
    assert [g["name"] for g in adamw.param_groups] == ["decay", "no_decay"]
    assert [g["param_names"] for g in adamw.param_groups] == [
        [name for name, _ in group["params"]] for group in parameter_groups(model, OptimConfig())
    ]
