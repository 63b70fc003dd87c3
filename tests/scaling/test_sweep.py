"""The sweep: its grid, a stop, a limit of time, and runs of a known law; then runs that are really trained."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from minillama.commands.cli import main
from minillama.commands.scaling import Fit
from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.runs.config import RunConfig, load_run_config
from minillama.runs.report import PlainReport
from minillama.scaling import sweep
from minillama.scaling.fit import fit
from minillama.scaling.laws import Law
from minillama.scaling.points import read_runs
from minillama.scaling.shapes import batch_tokens, size
from minillama.training.run import train

LAW = Law(1.2, 150.0, 300.0, 0.3, 0.33)
BUDGETS = (1e12, 2e12, 4e12, 8e12)


class Trainer:
    """Writes run folders whose losses are a law's; every run takes a second per 1e12 FLOPs."""

    def __init__(self, law: Law = LAW, stop_after: int = 10**9) -> None:
        self.law, self.left, self.trained = law, stop_after, []  # type: ignore[var-annotated]

    def __call__(self, path: Path, folder: Path) -> int:
        if not self.left:
            return 130
        self.left -= 1
        self.trained.append(folder.name)
        config = load_run_config(str(path))
        tokens = config.train.steps * config.train.batch_size * config.context
        loss = self.law.loss(size(config.model), tokens)
        (folder / "model").mkdir(parents=True)
        (folder / "config.toml").write_text(path.read_text())
        seconds = tokens * config.model.flops_per_token(config.context) / 1e12
        record = {"step": config.train.steps, "tokens": tokens, "val_loss": loss, "val_bits_per_byte": loss / 3}
        (folder / "metrics.jsonl").write_text(json.dumps(record | {"seconds": seconds}) + "\n")
        (folder / "provenance.jsonl").write_text(json.dumps({"data": "d", "tokenizer": "t"}) + "\n")
        return 0


@pytest.fixture(scope="module")
def base() -> RunConfig:
    return load_run_config("scaling")


def make(base: RunConfig, folder: Path, train: Trainer, **options: float) -> sweep.Sweep:
    return sweep.Sweep(base, folder, BUDGETS, train=train, say=lambda text: None, **options)  # type: ignore[arg-type]


def test_the_grid_spends_its_budgets(base: RunConfig, tmp_path: Path) -> None:
    train = Trainer()
    assert make(base, tmp_path, train).run()
    points = read_runs([tmp_path]).points
    assert len(points) == len(train.trained) >= 20
    for point in points:
        budget = min(BUDGETS, key=lambda c: abs(math.log(point.flops / c)))
        assert point.flops == pytest.approx(budget, rel=0.04)
    sizes = {budget: sorted(p.params for p in points if abs(p.flops / budget - 1) < 0.1) for budget in BUDGETS}
    for budget, own in sizes.items():
        assert len(own) >= 5 and own[0] < LAW.optimum(budget)[0] < own[-1]
        best = min((p for p in points if abs(p.flops / budget - 1) < 0.1), key=lambda p: p.loss)
        assert own[0] < best.params < own[-1]


def test_the_laws_come_back(base: RunConfig, tmp_path: Path) -> None:
    assert make(base, tmp_path, Trainer()).run()
    table = read_runs([tmp_path])
    law = fit(table, 3, resamples=0).law
    assert law is not None and (law.alpha, law.beta, law.E) == pytest.approx((0.3, 0.33, 1.2), rel=1e-6)
    isoflop = fit(table, 2, resamples=0)
    assert not any("edge" in note or "left out" in note for note in isoflop.notes)
    assert fit(table, 1, resamples=0).params.exponent > 0


@pytest.mark.parametrize(
    ("law", "factor"), [(replace(LAW, A=600.0), 1), (replace(LAW, B=900.0), 100)], ids=["larger", "smaller"]
)
def test_sizes_are_added_until_the_minimum_lies_within(
    base: RunConfig, tmp_path: Path, law: Law, factor: float
) -> None:
    train = Trainer(law)
    budgets = [factor * flops for flops in BUDGETS]
    assert sweep.Sweep(base, tmp_path, budgets, 3, train=train, say=lambda text: None).run()
    assert len(train.trained) > 12
    table = fit(read_runs([tmp_path]), 2, resamples=0)
    assert table.optima is not None and len(table.optima.params) == 4
    assert not any("edge" in note for note in table.notes)


def test_a_stopped_sweep_goes_on(base: RunConfig, tmp_path: Path) -> None:
    whole, first, second = Trainer(), Trainer(stop_after=7), Trainer()
    assert make(base, tmp_path / "whole", whole).run()
    assert not make(base, tmp_path / "parts", first).run()
    assert make(base, tmp_path / "parts", second).run()
    assert first.trained + second.trained == whole.trained


def test_a_limit_of_time(base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: 100.0))  # the runs' own seconds alone count
    said: list[str] = []
    train = Trainer()
    grid = sweep.Sweep(base, tmp_path, BUDGETS, minutes=3 / 60, train=train, say=said.append)
    assert not grid.run()  # a run of the third budget takes four seconds
    assert "was not started" in said[-1] and train.trained[-1].startswith("C2e12")


def test_other_settings_are_refused(base: RunConfig, tmp_path: Path) -> None:
    assert not make(base, tmp_path, Trainer(stop_after=2)).run()
    with pytest.raises(InputError, match="other settings"):
        make(replace(base, seed=2), tmp_path, Trainer()).run()
    for budgets, sizes in (((1e12,), 5), ((2e12, 1e12), 5), ((1e12, 2e12), 2), ((1e12, 2e12), 1000)):
        with pytest.raises(InputError, match=r"--budgets|--sizes"):
            sweep.Sweep(base, tmp_path, budgets, sizes)


def test_runs_have_the_plans_batch_and_the_bases_rate(base: RunConfig) -> None:
    model = sweep.ladder(base.model)[3]
    config = sweep.run_config(base, model, 1e13)
    assert config.optim.lr == base.optim.lr and config.seed == base.seed
    assert config.train.batch_size == round(batch_tokens(1e13) / 256)
    assert config.optim.mup_base_dim == 64 and config.mup.width == model.dim / 64 and config.mup.head == 1
    assert config.validate.every == config.train.steps and config.optim.warmup_steps == config.train.steps // 20


def test_the_ladder_rises_evenly() -> None:
    sizes = [size(model) for model in sweep.ladder(ModelConfig(vocab_size=2048, max_seq_len=256, head_dim=16))]
    ratios = [b / a for a, b in pairwise(sizes)]
    assert sizes[:3] == [41040, 105696, 181584] and max(ratios[1:]) < 2.2 and min(ratios) > 1.4


def test_the_prediction_is_the_first_one(base: RunConfig, tmp_path: Path) -> None:
    grid = make(base, tmp_path, Trainer())
    assert grid.run()
    fits, _ = Fit((tmp_path,), bootstrap=50).fits(read_runs([tmp_path]))
    config, made = sweep.predict(grid, fits)
    assert made["flops"] == pytest.approx(3.2e13, rel=0.02)
    assert made["params"] == pytest.approx(LAW.optimum(3.2e13)[0], rel=0.5)
    assert grid.finish(config, tmp_path / "next/run")
    (measured,) = read_runs([tmp_path / "next/run"]).points
    assert made["loss"] == pytest.approx(measured.loss, rel=1e-6) and measured.tokens == made["tokens"]
    assert made["least_loss"] == pytest.approx(measured.loss, rel=0.02)
    assert made["interval"][0] <= measured.loss * (1 + 1e-6) and measured.loss <= made["interval"][1] * (1 + 1e-6)
    other = {3: replace(fits[3], law=replace(LAW, E=2.0))}
    assert sweep.predict(grid, other) == (config, json.loads((tmp_path / "next/prediction.json").read_text()))
    assert len(read_runs([tmp_path]).points) == len(list(tmp_path.glob("C*/model")))  # without the next one
    with pytest.raises(InputError, match="no parametric fit"):
        sweep.predict(grid, {})


def test_the_command_compares_prediction_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(stop_after=3)
    monkeypatch.setattr(sweep, "Sweep", partial(sweep.Sweep, train=trainer))
    words = ["scaling", "sweep", "--out", str(tmp_path / "runs"), "--budgets", "1e12", "2e12", "4e12"]
    assert main(words) == 1
    assert "the same command goes on" in capsys.readouterr().out
    trainer.left = 1000
    assert main([*words, "--next"]) == 0
    said = capsys.readouterr().out
    assert "measured loss" in said and "off by +0.00%" in said.replace("-0.00", "+0.00")
    assert "matrices of the blocks" in said
    assert Law.load(str(tmp_path / "runs/law.toml")).alpha == pytest.approx(0.3, rel=1e-5)


@pytest.mark.slow
def test_a_sweep_is_trained(tmp_path: Path) -> None:
    """Real runs, of seconds, in this process; then the fit of whatever came out."""
    words = "abcdefghijklmnopqrstuvwxyz"
    lines = [" ".join(words[(i * j) % 23 : (i * j) % 23 + 3] for j in range(3, 12)) for i in range(3000)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    options = ["--model.vocab_size", "300", "--model.max_seq_len", "32", "--train.compile", "false"]
    options += ["--data.sources", str(tmp_path / "text.txt"), "--data.cache", str(tmp_path / "cache")]
    base = load_run_config("scaling", [*options, "--validate.tokens", "2000"])

    def here(path: Path, folder: Path) -> int:
        return train(load_run_config(str(path)), str(folder), report=PlainReport(Console(quiet=True)))

    grid = sweep.Sweep(base, tmp_path / "runs", (1e10, 2e10), 3, train=here, say=print)
    assert grid.run()
    table = read_runs([tmp_path / "runs"])
    assert len(table.points) >= 6 and not table.notes
    assert all(0 < point.loss < math.log(300) for point in table.points)
