"""GRPO and PPO of divided models give what one process gives: rewards, losses, gradient norms, weights, folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from minillama.config import ModelConfig
from minillama.config.lora import LoRAConfig
from minillama.inference.rollout import DecodingCopy, plain_weights
from minillama.model import Decoder
from minillama.model.lora import add_lora
from minillama.runs.config import RunConfig
from minillama.runs.parallel import ParallelConfig
from minillama.runs.report import SilentReport
from minillama.training.parallel import processes
from minillama.training.run import train
from minillama.training.sharded import local
from minillama.training.whole_weights import whole_weights

from .test_feedback_runs import GRPO, PPO, start
from .test_feedback_runs import words as feedback
from .test_parallel import Job, Make, assert_equal, compare, free_port, on, options, spawn, tiny_config

__all__ = ["start", "tiny_config"]  # fixtures; on GPUs, over NCCL, too
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


SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=8, n_kv_heads=4, hidden_dim=48, vocab_size=61, max_seq_len=16)
BIASED = replace(SHAPE, bias="qkv", norm="layer", tie_embeddings=True)
MODELS: dict[str, tuple[ModelConfig, LoRAConfig | None]] = {
    "plain": (SHAPE, None),
    "biased": (BIASED, None),
    "adapter": (BIASED, LoRAConfig(rank=3)),
}
# what `tensor` has not
SHARDED = MODELS | {
    "magnitudes": (SHAPE, LoRAConfig(rank=3, use_dora=True)),
    "vocabulary": (SHAPE, LoRAConfig(rank=3, targets=("embed_tokens", "q_proj"), modules_to_save=("lm_head",))),
}


def gather(rank: int, world: int, port: int, meshes: Mapping[str, ParallelConfig]) -> None:
    """Compare what is gathered of a divided model, also between the passes of training, with what was divided."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for mesh, axes in meshes.items():
        for name, (shape, lora) in (SHARDED if axes.tensor == 1 else MODELS).items():
            model = drawn(shape, lora)
            expected = {key: weight.clone() for key, weight in plain_weights(model).items()}
            with processes(RunConfig(model=shape, parallel=axes)) as parallel:
                parallel.divide(model, torch.bfloat16 if axes.tensor == 1 else torch.float32)
                copied, tokens = DecodingCopy(model, whole_weights, torch.bfloat16), torch.arange(12).view(2, 6)
                model.loss(model.hidden(tokens), tokens).backward()
                found = {key: weight.clone() for key, weight in whole_weights(model).items()}
                model.hidden(tokens)  # FSDP has not given back what it has gathered for it
                with torch.no_grad():
                    for tensor in model.state_dict().values():  # the parts, as the optimizer changes them
                        local(tensor).mul_(2)
                changed = {key: weight.clone() for key, weight in whole_weights(model).items()}
            first = copied.model.model.embed_tokens.weight.clone()
            assert [*found] == [*expected] == [*changed]
            for key, weight in expected.items():
                assert not hasattr(found[key], "full_tensor") and found[key].dtype == weight.dtype
                torch.testing.assert_close(
                    found[key],
                    weight,
                    atol=1e-6,
                    rtol=1e-6,
                    msg=lambda text, k=f"{mesh}, {name}, {key}": f"{k}: {text}",
                )
            assert torch.equal(first, expected["model.embed_tokens.weight"].bfloat16())
            with processes(RunConfig(model=shape, parallel=axes)):
                refreshed = copied.refresh().model.embed_tokens.weight
            assert torch.equal(refreshed, changed["model.embed_tokens.weight"].bfloat16())
            assert not torch.equal(refreshed, first)
    distributed.destroy_process_group()


def drawn(shape: ModelConfig, lora: LoRAConfig | None) -> Decoder:
    torch.manual_seed(3)
    model = Decoder(shape)
    if lora is not None:
        add_lora(model, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def test_whole_weights_are_those_that_were_divided() -> None:
    """With the adapters in them; of a model that is about to be updated, and into its decoding copy."""
    meshes = {"shard 2": ParallelConfig(shard=2), "tensor 2": ParallelConfig(tensor=2)}
    multiprocessing.spawn(gather, (2, free_port(), meshes), nprocs=2)


@pytest.mark.slow
def test_whole_weights_of_two_axes() -> None:
    meshes = {"shard 2, tensor 2": ParallelConfig(shard=2, tensor=2), "data 2, shard 2": ParallelConfig(shard=2)}
    multiprocessing.spawn(gather, (4, free_port(), meshes), nprocs=4)


@pytest.mark.slow
def test_objectives(tiny_config: Make, start: Path, text_file: Path, tmp_path: Path) -> None:
    """With and without a reference; critics of their own, whose folders are whole; text, averages, adapters."""
    more = options(objective__average_decay=0.5, objective__text=text_file)
    free = [*GRPO, "--objective.kl", "none", "--objective.oversample", "2"]
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
