"""Preferences whose truth is known: the Bayes limit of a reward model, and DPO beside what it then samples."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from minillama.runs.objectives import DPOConfig


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks/preferences.py"
    spec = importlib.util.spec_from_file_location("preferences_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_reward_model_reaches_the_bayes_limit_and_does_not_pass_it(bench: ModuleType, seed: int) -> None:
    found = bench.reward_limit(seed, 4000, 3)
    assert -0.02 <= found["accuracy"] - found["limit"] <= 0.005
    assert found["correlation"] > 0.92 and 0.8 < found["slope"] < 1.2 and found["order"] > 0.9


@pytest.mark.slow
def test_labels_without_meaning_teach_nothing(bench: ModuleType) -> None:
    found = bench.reward_limit(0, 4000, 1, is_control=True)
    assert abs(found["accuracy"] - 0.5) < 0.04 and abs(found["correlation"]) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_implicit_accuracy_alone_is_no_proof(bench: ModuleType, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    start = bench.fine_tuned(seed)
    plain, with_sft = (bench.digits_dpo(start, seed, 150, DPOConfig(sft=weight)) for weight in (0.0, 1.0))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  first loss 0.6931472" and plain["val_accuracy"] > 0.98 and with_sft["val_accuracy"] > 0.98
    assert plain["reversed"] < 0.05 and plain["sorted"] < 0.85 and plain["warned"]
    assert with_sft["sorted"] > 0.9 and with_sft["val_chosen_log_ratio"] > plain["val_chosen_log_ratio"]
