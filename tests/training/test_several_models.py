"""An objective of two models, a policy and a value head, with a frozen companion and a buffer of its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from minillama.data.corpus import Corpus
from minillama.errors import InputError
from minillama.model import Decoder
from minillama.runs.config import RunConfig, load_run_config
from minillama.tokenizer import Tokenizer
from minillama.training import run
from minillama.training.gradients import clip
from minillama.training.objectives.base import Batch, Metrics
from minillama.training.objectives.lm import LanguageModel
from minillama.training.precision import choose_precision
from minillama.training.run import train
from minillama.training.state import TrainingState

from .test_trainer import Quiet

Make = Callable[..., RunConfig]


class PolicyAndValue(LanguageModel):
    """Next tokens, and a value head that learns how many nats a frozen model takes for each, in rounds of two steps."""

    best: tuple[str, Literal["min", "max"]] = ("val_gain", "max")

    def __init__(self, config: RunConfig, model: Decoder, data: Corpus) -> None:
        super().__init__(model, data, config.seed, config.train.batch_size, config.context)
        generator = torch.Generator().manual_seed(5)
        value = nn.Linear(config.model.dim, 1)
        with torch.no_grad():
            value.weight.normal_(0, 0.1, generator=generator)
            value.bias.zero_()
        self.models = {**self.models, "value": value}
        reference = Decoder(config.model)
        reference.init_weights(torch.Generator().manual_seed(9))
        self.companions = {"reference": reference}
        self.buffer = torch.zeros(2, self.context)

    def prepare(self, step: int) -> Metrics:
        if step % 2 == 0:  # a buffer that the next step needs too
            tokens = super().batch(step).tokens
            reference = self.companions["reference"]
            assert isinstance(reference, Decoder) and not any(p.requires_grad for p in reference.parameters())
            with torch.no_grad():
                logits = reference(tokens).float()[:, :-1]
                nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            self.buffer = F.pad(nats.view(len(tokens), -1), (0, 1))[:2].clone()
        return {"reference_nats": float(self.buffer.mean())}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        plain = super().batch(step, rank, world)
        wanted = self.buffer.repeat(len(plain.tokens) // 2, 1)
        count = float(len(plain.tokens))
        totals = {"policy": count * self.context, "value": count, "error": count}
        return Batch(plain.tokens, plain.targets, plain.weights, extras={"nats": wanted}, totals=totals)

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        hidden = self.model.hidden(batch.tokens)
        value = self.models["value"](hidden.detach())[..., 0].float()
        errors = (value - batch.extras["nats"]) ** 2
        policy = self.model.loss(hidden, batch.targets)
        return {"policy": policy, "value": errors.mean(1).sum()}, {"error": errors.mean(1).sum()}

    def validate(self, rows: int, limit: int) -> Metrics:
        found = super().validate(rows, limit)
        return {**found, "val_gain": 10 - found["val_loss"]}

    def state_dict(self) -> dict[str, Tensor]:
        return {"buffer": self.buffer}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.buffer = state["buffer"]


class StopAt(Quiet):
    """Asks to stop after a step, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, record: dict) -> None:
        if record["step"] == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(config: RunConfig, model: Decoder, tokenizer: Tokenizer, data: Corpus, *_: object) -> PolicyAndValue:
        return PolicyAndValue(config, model, data)

    monkeypatch.setattr(run, "make_staged", make)


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "mfu")} for line in lines]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_trains_is_written_and_resumes_to_the_bit(
    two_models: None, tiny_config: Make, tmp_path: Path, dtype: str
) -> None:
    config = tiny_config("--train.dtype", dtype, "--train.micro_batch_size", "2", "--optim.grad_clip", "0.5")
    assert train(config, str(tmp_path / "whole"), report=Quiet()) == 0
    for stop in (3, 7):  # within a round of the buffer
        assert train(config, str(tmp_path / "cut"), resume=stop > 3, report=StopAt(stop)) == 143
    assert train(config, str(tmp_path / "cut"), resume=True, report=Quiet()) == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert metrics(whole) == metrics(cut)
    for name in ("optimizer.safetensors", "model.safetensors"):
        one, two = (load_file(out / "checkpoints" / "step-12" / name) for out in (whole, cut))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    held = load_file(whole / "checkpoints" / "step-12" / "optimizer.safetensors")
    assert {"models/value/weight", "models/value/bias", "objective/buffer", "value/weight/exp_avg"} <= held.keys()
    assert not any("reference" in name for name in held)
    taken = [line for line in metrics(whole) if "grad_norm" in line]
    assert len(taken) == 12 and all(line["value_grad_norm"] > 0 and line["reference_nats"] > 0 for line in taken)
    for line in taken:
        assert line["loss"] == pytest.approx(line["loss_policy"] + line["loss_value"])
        assert line["loss_value"] == pytest.approx(line["error"])
    assert taken[-1]["loss_policy"] < taken[0]["loss_policy"] and taken[-1]["loss_value"] < taken[0]["loss_value"]


def test_the_best_is_the_objectives(two_models: None, tiny_config: Make, tmp_path: Path) -> None:
    report = Quiet()
    assert train(tiny_config(), str(tmp_path / "run"), report=report) == 0
    gains = {
        line["step"]: line["val_gain"] for line in metrics(tmp_path / "run") if line.get("val_gain") and line["step"]
    }
    best = max(gains, key=lambda step: gains[step])
    assert any(f"best val_gain {gains[best]:.4f}" in line and f"step-{best}" in line for line in report.lines)


def test_another_companion_is_refused(two_models: None, tiny_config: Make, tmp_path: Path) -> None:
    assert train(tiny_config(), str(tmp_path / "run"), report=StopAt(5)) == 143
    original = PolicyAndValue.__init__

    def other(self: PolicyAndValue, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        self.companions["reference"].model.norm.weight.data.mul_(2)  # type: ignore[union-attr,index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyAndValue, "__init__", other)
        with pytest.raises(InputError, match="the reference is not what"):
            train(tiny_config(), str(tmp_path / "run"), resume=True, report=Quiet())
    assert train(tiny_config(), str(tmp_path / "run"), resume=True, report=Quiet()) == 0


def test_what_two_models_share_is_clipped_once() -> None:
    trunk = nn.Linear(4, 4, bias=False)
    one, two = nn.Sequential(trunk, nn.Linear(4, 2)), nn.Sequential(trunk, nn.Linear(4, 1))
    for parameter in (*one.parameters(), *two.parameters()):
        parameter.grad = torch.ones_like(parameter) * 5
    norms = clip({"model": one, "value": two}, 1.0)
    assert norms == pytest.approx({"grad_norm": 5 * 26**0.5, "value_grad_norm": 5 * 5**0.5})
    assert sum(float(p.grad.norm()) ** 2 for p in one.parameters()) == pytest.approx(1, rel=1e-4)  # type: ignore[union-attr]


def test_a_term_that_a_batch_does_not_have_is_no_division_by_zero() -> None:
    batch = Batch(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), totals={"policy": 6.0, "sft": 0.0})
    assert batch.total("sft") == 1 and batch.total("accuracy") == 6
    with pytest.raises(ValueError, match="no equal parts for 3"):
        batch.share(0, 3)


def test_stages_name_the_parameters_of_every_model(two_models: None, tiny_config: Make, tmp_path: Path) -> None:
    stages = '[[stages]]\nuntil_step = 2\ntrainable = ["value/*"]\n[[stages]]\nuntil_step = 4\ntrainable = ["*norm*"]\n'
    tiny_config()
    file = tmp_path / "fixture.toml"
    file.write_text(file.read_text() + stages)
    words = ("--train.steps", "4", "--train.batch_size", "4", "--checkpoint.every", "2", "--checkpoint.keep", "9")
    assert train(load_run_config(str(file), words), str(tmp_path / "run"), report=Quiet()) == 0
    names = ("models/value/weight", "models/value/bias")
    states = [load_file(tmp_path / f"run/checkpoints/step-{at}/optimizer.safetensors") for at in (2, 4)]
    weights = [load_file(tmp_path / f"run/checkpoints/step-{at}/model.safetensors") for at in (2, 4)]
    assert states[0]["models/value/bias"].abs().max() > 0  # where it starts at 0
    assert all(torch.equal(states[0][name], states[1][name]) for name in names)  # frozen in the second stage
    moved = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert moved and all("norm" in name for name in moved)
    file.write_text(file.read_text().replace("value/*", "critic/*"))
    with pytest.raises(InputError, match="no parameter has such a name"):
        train(load_run_config(str(file), words), str(tmp_path / "other"), report=Quiet())


def test_a_working_copys_running_statistics_reach_the_model() -> None:
    master = nn.Sequential(nn.BatchNorm1d(3))
    precision = choose_precision(master, torch.bfloat16)
    precision.model(torch.full((4, 3), 2.0, dtype=torch.bfloat16))
    precision.refresh()
    assert torch.allclose(master[0].running_mean, torch.full((3,), 0.2), atol=1e-2)


@pytest.mark.parametrize("name", ["objective", "models", "a/b"])
def test_a_reserved_name_of_a_model_is_refused(name: str) -> None:
    class Odd:
        models: Mapping[str, nn.Module] = {name: nn.Linear(1, 1)}
        companions: Mapping[str, nn.Module] = {}

    with pytest.raises(ValueError, match="cannot be named"):
        TrainingState(Odd(), None, [], None)  # type: ignore[arg-type]
