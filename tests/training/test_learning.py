"""Short forms of benchmarks/feedback.py: objectives find the optimum that is known, and learn what can be checked."""

from __future__ import annotations

import sys
from functools import cache
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor


@cache
def benchmark() -> ModuleType:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = util.spec_from_file_location("feedback", folder / "feedback.py")
        assert spec is not None and spec.loader is not None
        module = util.module_from_spec(spec)
        sys.modules["feedback"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@cache
def learned(name: str) -> Tensor:
    made = benchmark()
    settings = made.BANDITS[name][0]
    return made.bandit(settings, seed=1, steps=150 * settings.epochs, rows=256, rate=2e-3)


def test_the_optimum_is_that_of_the_formula() -> None:
    made = benchmark()
    torch.testing.assert_close(made.reverse_kl(), [0.08507, 0.17344, 0.31430, 0.42718], atol=1e-5, rtol=0)
    torch.testing.assert_close(made.forward_kl(), [0.12592, 0.13783, 0.16998, 0.56627], atol=1e-5, rtol=0)
    torch.testing.assert_close(made.tempered(), [0.10956, 0.19711, 0.31523, 0.37810], atol=1e-5, rtol=0)
    torch.testing.assert_close(made.forward_kl(0.875), [0.14192, 0.15435, 0.18716, 0.51657], atol=1e-5, rtol=0)


NAMES = [
    "RLOO, k1 in the reward",
    "PPO, k1 in the reward",
    "RLOO, k2 in the loss",
    "RLOO, k3 in the loss",
    "group mean, k2 in the loss",
    "GRPO (std), k3 in the loss",
    "RLOO, no KL",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_objective_finds_its_optimum(name: str) -> None:
    _, wanted, bound = benchmark().BANDITS[name]
    assert (learned(name) - torch.tensor(wanted)).abs().max() < bound + 0.01


@pytest.mark.slow
def test_the_estimators_of_the_kl_end_apart() -> None:
    reverse, forward = learned("RLOO, k1 in the reward")[3], learned("RLOO, k3 in the loss")[3]
    assert forward - reverse > 0.12 and abs(learned("RLOO, k2 in the loss")[3] - reverse) < 0.03


@pytest.mark.slow
def test_sorting_is_learned_from_a_checker_and_not_from_a_coin(tmp_path: Path) -> None:
    found = benchmark().sorting(tmp_path, 1, 200, 100, ["grpo", "grpo control"])
    start, after, control = (found[name] for name in ("fine-tuning", "grpo", "grpo control"))
    assert 0.2 < start["pass@1"] < 0.95
    assert after["greedy"] > 0.95 and after["pass@1"] - start["pass@1"] > 0.08
    assert control["pass@1"] < start["pass@1"]
