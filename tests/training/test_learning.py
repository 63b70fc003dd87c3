"""Short forms of the benchmarks of learning from feedback: known optima, checkers, and controls that must fail."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from minillama.runs.objectives import DPOConfig


@cache
def benchmark(name: str) -> ModuleType:
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return import_module(name)
    finally:
        sys.path.remove(folder)


SEEDS = (1, 2, 3)


@cache
def learned(name: str, seed: int) -> Tensor:
    made = benchmark("feedback_bandit")
    settings = made.BANDITS[name][0]
    return made.bandit(settings, seed, steps=150 * getattr(settings, "epochs", 1), rows=256, rate=2e-3)


def test_the_optima_are_those_of_the_formulas() -> None:
    made = benchmark("feedback_bandit")
    assert made.reverse_kl() == pytest.approx([0.08507, 0.17344, 0.31430, 0.42718], abs=1e-5)
    assert made.forward_kl() == pytest.approx([0.12592, 0.13783, 0.16998, 0.56627], abs=1e-5)
    assert made.tempered() == pytest.approx([0.10956, 0.19711, 0.31523, 0.37810], abs=1e-5)
    assert made.best(4) == pytest.approx([0.0256, 0.2145, 0.4160, 0.3439], abs=1e-5)
    assert made.best(16) == pytest.approx([0.0, 0.00332, 0.18198, 0.81470], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", list(benchmark("feedback_bandit").BANDITS))
def test_every_objective_finds_its_optimum(name: str, seed: int) -> None:
    made = benchmark("feedback_bandit")
    _, wanted, bound = made.BANDITS[name]
    slack = 0.03 if name == "DPO" else 0.01  # which is the slowest
    assert made.distance(learned(name, seed), wanted) < bound + slack
    assert name == "DPO" or learned(name, seed).sum() > 0.98  # DPO alone says nothing of other answers


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_sorting_is_learned_from_a_checker_and_not_from_a_coin(seed: int, tmp_path: Path) -> None:
    found = benchmark("feedback").sorting(tmp_path, seed, 200, 100, ["grpo", "grpo control"])
    start, after, control = (found[name] for name in ("fine-tuning", "grpo", "grpo control"))
    assert 0.2 < start["pass@1"] < 0.95
    assert after["greedy"] > 0.95 and after["pass@1"] - start["pass@1"] > 0.02
    assert control["pass@1"] < start["pass@1"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_model_reaches_the_bayes_limit_and_does_not_pass_it(seed: int) -> None:
    found = benchmark("preferences").reward_limit(seed, 4000, 3)
    assert -0.02 <= found["accuracy"] - found["limit"] <= 0.005
    assert found["correlation"] > 0.92 and 0.8 < found["slope"] < 1.2 and found["order"] > 0.9
    control = benchmark("preferences").reward_limit(seed, 4000, 1, is_control=True)
    assert abs(control["accuracy"] - 0.5) < 0.04 and abs(control["correlation"]) < 0.7  # of 16 weights


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_implicit_accuracy_alone_is_no_proof(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    made = benchmark("preferences")
    start = made.fine_tuned(seed)
    plain, with_sft = (made.digits_dpo(start, seed, 150, DPOConfig(sft=weight)) for weight in (0.0, 1.0))
    assert capsys.readouterr().out.splitlines()[0] == "  first loss 0.6931472"
    assert plain["val_accuracy"] > 0.98 and with_sft["val_accuracy"] > 0.98
    assert plain["reversed"] < 0.05 and plain["sorted"] < 0.85 and plain["warned"]
    assert with_sft["sorted"] > 0.9 and with_sft["val_chosen_log_ratio"] > plain["val_chosen_log_ratio"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS[:1])  # the benchmark has three
def test_happy_stories_with_a_bounded_reward_and_alarms_without_one(seed: int, shared: Path, tmp_path: Path) -> None:
    """stories260K on beginnings that it was not trained on."""
    files = (shared / "models/stories260K/checkpoint_legacy.bin", shared / "tokenizer/stories260K/tok512.bin")
    stories = benchmark("feedback").stories
    bounded = stories(tmp_path / "bounded", *files, "bounded", seed, 30)
    before, after = bounded["before"], bounded["after"]
    assert before["reward"] < 0.5 and after["reward"] > 2.2 and after["kl"] < 15
    assert after["distinct-2"] > 0.8 * before["distinct-2"] and not bounded["warnings"]
    hacked = stories(tmp_path / "unbounded", *files, "unbounded", seed, 30)
    assert hacked["after"]["reward"] > 5 and hacked["after"]["distinct-2"] < 0.5 * before["distinct-2"]
    said = "\n".join(hacked["warnings"])
    assert "nats per answer to the start model" in said and "answers repeat themselves" in said
