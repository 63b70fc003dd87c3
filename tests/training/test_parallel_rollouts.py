"""GRPO and PPO of divided models give what one process gives: rewards, losses, gradient norms, weights, folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from minillama.model import Decoder
from minillama.runs.report import SilentReport
from minillama.training.run import train

from .test_feedback_runs import GRPO, PPO, start
from .test_feedback_runs import words as feedback
from .test_parallel import Job, Make, assert_equal, compare, on, options, spawn

__all__ = ["start"]  # a fixture
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

# Adam brings gradients that are nothing but rounding to the size of all others, unless its epsilon is larger than they
COMMON = options(train__micro_batch_size=2, train__steps=5, validate__every=5, optim__eps=1e-4)
SHARED = [*PPO, "--objective.critic", "shared"]


def test_a_rollout_goes_on_on_another_mesh(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    """A policy, its reference and a head of values, stopped in the second epoch of the first rollout."""
    words = [*feedback(start, *SHARED), *COMMON]
    shard, tensor = (tiny_config(*words, *on(mesh)) for mesh in ("shard 2", "tensor 2"))
    assert train(tiny_config(*words), str(tmp_path / "alone"), report=SilentReport()) == 0
    cut = tmp_path / "cut"
    jobs = [Job(shard, tmp_path / "shard"), Job(tensor, tmp_path / "tensor"), Job(shard, cut, stop=3)]
    jobs += [Job(tensor, tmp_path / "other", source=cut)]
    spawn(2, jobs)
    assert train(tiny_config(*words), str(cut), resume=True, report=SilentReport()) == 0
    for job in jobs:
        assert_equal(job.out, tmp_path / "alone")


@pytest.mark.slow
def test_objectives(tiny_config: Make, start: Path, text_file: Path, tmp_path: Path) -> None:
    """With and without a reference; critics of their own, whose folders are whole; text, averages, adapters."""
    more = options(objective__average_decay=0.5, objective__text=text_file)
    free = [*GRPO, "--objective.kl", "none"]
    variants = {"grpo": GRPO, "free": free, "ppo": [*PPO, *more], "ppo lora": [*PPO, *options(lora__rank=2)]}
    variants["grpo lora"] = [*GRPO, *options(lora__rank=2)]
    variants["shared, without a reference"] = [*SHARED, *options(objective__kl="none", objective__kl_target=0)]
    variants["own, without a reference"] = [*PPO, *options(objective__kl="none", objective__kl_target=0)]
    made = {name: [*feedback(start, *words), *COMMON] for name, words in variants.items()}
    compare(2, tiny_config, tmp_path, made, ["shard 2", "tensor 2"])
    for mesh in ("shard 2", "tensor 2"):
        for name in ("value", "average"):
            one, other = (load_file(tmp_path / f"ppo {on}" / name / "model.safetensors") for on in (mesh, "alone"))
            assert one.keys() == other.keys() and all((one[k] - other[k]).abs().max() < 2e-5 for k in one)


@pytest.mark.slow
def test_four_processes(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    """Each answers its own prompts, those of a tensor-parallel group, too."""
    variants = {"grpo": GRPO, "ppo": PPO, "shared": SHARED}
    made = {name: [*feedback(start, *words), *COMMON] for name, words in variants.items()}
    compare(4, tiny_config, tmp_path, made, ["data 2, shard 2", "shard 2, tensor 2"])


@pytest.mark.slow
def test_bfloat16(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    """One step: of the next one's answers some would begin to differ by rounding."""
    low = [*COMMON, *options(train__dtype="bfloat16", train__steps=1, validate__every=1)]
    made = {name: [*feedback(start, *words), *low] for name, words in {"grpo": GRPO, "shared": SHARED}.items()}
    compare(2, tiny_config, tmp_path, made, ["data 2", "shard 2", "tensor 2"], tolerance=2e-2)


@pytest.mark.slow
def test_reward_models_stay_whole(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    """Of a shape that the processes do not divide."""
    words = [*feedback(start, *PPO), *options(train__steps=1)]
    assert train(tiny_config(*words), str(tmp_path / "first"), report=SilentReport()) == 0
    reward = str(tmp_path / "first/value")
    made = [reward if word == "verified" else word for word in [*feedback(start, *GRPO), *COMMON]]
    compare(2, tiny_config, tmp_path, {"model": made}, ["shard 2", "tensor 2"])
    assert Decoder.from_pretrained(tmp_path / "model shard 2/model").dtype == torch.float32
