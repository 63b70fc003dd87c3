"""Several processes that train one model give what one process gives: losses, gradient norms and weights.

Each test has a twin on GPUs, over NCCL: `pytest -m cuda`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from minillama.runs.config import RunConfig
from minillama.runs.report import SilentReport
from minillama.training.run import train

from .test_feedback_runs import GRPO, PPO, TIMES, start
from .test_feedback_runs import words as feedback
from .test_several_models import StopAt

__all__ = ["start"]  # a fixture

Make = Callable[..., RunConfig]
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


GPUS = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL has a GPU per process, and there are fewer than 2"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPUS)])
def tiny_config(request: pytest.FixtureRequest, tiny_config: Make) -> Make:
    """The small run of all tests, on each kind of device."""
    return lambda *words: tiny_config(*options(train__device=request.param), *words)


class Job(NamedTuple):
    """A run of all processes of a world.

    Args:
        stop: step at which the first process gets a SIGTERM; 0: none.
        source: folder of a run that is copied and resumed.
        lags: it is resumed from the checkpoint before the newest, and processes other than the first see no metrics.
    """

    config: RunConfig
    out: Path
    stop: int = 0
    source: Path | None = None
    lags: bool = False


def work(rank: int, world: int, port: int, jobs: Sequence[Job]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    backend = "gloo"
    if jobs[0].config.train.device == "cuda":
        os.environ["LOCAL_RANK"], backend = str(rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(rank)
    distributed.init_process_group(backend, timeout=timedelta(seconds=60))
    for job in jobs:
        if job.source is not None and rank == 0:
            shutil.copytree(job.source, job.out)
            if job.lags:
                shutil.rmtree(max((job.out / "checkpoints").glob("step-*")))
        report = StopAt(job.stop) if job.stop else SilentReport()
        blind = patch("minillama.training.trainer.read_metrics", return_value=[])
        try:
            with blind if job.lags and rank else nullcontext():
                status = train(job.config, str(job.out), resume=job.source is not None, report=report)
            assert status == (143 if job.stop else 0)
        except BaseException as error:
            error.add_note(f"in the run {job.out.name}")
            raise
    distributed.destroy_process_group()


def free_port() -> int:
    """A port that is free, below those that the system gives out: it is bound later, while other tests run."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def spawn(world: int, jobs: Sequence[Job]) -> None:
    if jobs[0].config.train.device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"NCCL has a GPU per process, and there are fewer than {world}")
    multiprocessing.spawn(work, (world, free_port(), jobs), nprocs=world)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next((out / "model").glob("*.safetensors")))


def assert_equal(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Losses, norms and measures of every step, and the final weights; GPUs add in another order."""
    settings = tomllib.loads((found / "config.toml").read_text())
    tolerance = max(tolerance, 1e-4) if settings["train"]["device"] == "cuda" else tolerance
    for a, b in zip(metrics(found), metrics(expected), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {*TIMES, "sample"}:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (found.name, a["step"], name)
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    for name in one:
        worst = (one[name] - other[name]).abs().max().item()
        assert worst <= 2 * tolerance, (found.name, name, worst)
        if tolerance > 1e-3:  # as large as what a weight moves in a test
            share = ((one[name] - other[name]).norm() / other[name].norm()).item()
            assert share <= 10 * tolerance, (found.name, name, share)


def compare(
    world: int,
    make: Make,
    folder: Path,
    variants: Mapping[str, Sequence[str]],
    meshes: Sequence[str],
    tolerance: float = 1e-5,
) -> None:
    """Every variant on every mesh, as "shard 2", against one process."""
    jobs, pairs = [], []
    for variant, words in variants.items():
        alone = folder / f"{variant} alone"
        assert train(make(*words), str(alone), report=SilentReport()) == 0
        for mesh in meshes:
            out = folder / f"{variant} {mesh}"
            jobs.append(Job(make(*words, *on(mesh)), out))
            pairs.append((out, alone))
    spawn(world, jobs)
    for out, alone in pairs:
        assert_equal(out, alone, tolerance)


def on(mesh: str) -> list[str]:
    """Words of a mesh, as "data 2, shard 2"."""
    return [word for axis in mesh.split(", ") for word in f"--parallel.{axis}".split(" ")]


def options(**values: object) -> list[str]:
    """Words of settings, with double underscores for dots."""
    return [word for name, value in values.items() for word in (f"--{name.replace('__', '.')}", str(value))]


MORE = options(train__checkpointing="true", metrics__every=2)


def test_two_processes_give_what_one_gives(tiny_config: Make, tmp_path: Path) -> None:
    """Tied, a vocabulary that does not divide, accumulation; and a checkpoint of one mesh goes on on others."""
    words = options(
        model__vocab_size=301, model__tie_embeddings="true", train__steps=4, validate__every=2, optim__grad_clip=0.5,
        train__micro_batch_size=1, checkpoint__every=100, sample__max_new_tokens=2,
    )  # fmt: skip
    shard, tensor = (tiny_config(*words, *on(mesh)) for mesh in ("shard 2", "tensor 2"))
    assert train(tiny_config(*words), str(tmp_path / "alone"), report=SilentReport()) == 0
    cut = tmp_path / "cut"
    jobs = [Job(shard, tmp_path / "shard"), Job(tensor, tmp_path / "tensor"), Job(shard, cut, stop=3)]
    jobs += [Job(shard, tmp_path / "again", source=cut), Job(tensor, tmp_path / "other", source=cut)]
    spawn(2, jobs)
    files = [path for path in (cut / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {
        ".safetensors",
        ".json",
        ".jsonl",
        ".toml",
        ".jinja",
        ".png",
    }  # no pickle
    names = {file.name for file in (cut / "checkpoints/step-3").glob("*.safetensors")}
    assert names == {"model.safetensors", *(f"optimizer-0000{i}-of-00002.safetensors" for i in (1, 2))}
    assert train(tiny_config(*words), str(cut), resume=True, report=SilentReport()) == 0
    for job in jobs:
        assert_equal(job.out, tmp_path / "alone")
        assert not [*(job.out / "checkpoints").glob(".*")]
    one, again = weights(tmp_path / "shard"), weights(tmp_path / "again")
    # to the bit; a GPU's attention adds its gradients in any order
    exact = shard.train.device == "cpu"
    assert all(torch.allclose(one[name], again[name], rtol=0, atol=0 if exact else 1e-5) for name in one)


@pytest.mark.slow
def test_replicas(tiny_config: Make, tmp_path: Path) -> None:
    words = options(train__steps=4, validate__every=2, model__vocab_size=301, sample__max_new_tokens=4)
    whole, parts = tiny_config(*words, *on("data 2")), tiny_config(*words, *on("shard 2"))
    assert train(tiny_config(*words), str(tmp_path / "alone"), report=SilentReport()) == 0
    jobs = [Job(whole, tmp_path / "data"), Job(parts, tmp_path / "cut", stop=3)]
    jobs += [Job(whole, tmp_path / "other", source=tmp_path / "cut"), Job(whole, tmp_path / "cut 2", stop=3)]
    jobs.append(Job(parts, tmp_path / "back", source=tmp_path / "cut 2"))
    jobs.append(Job(whole, tmp_path / "lagging", source=tmp_path / "cut 2", lags=True))  # by a slow file system
    spawn(2, jobs)
    for name in ("data", "other", "back", "lagging"):
        assert_equal(tmp_path / name, tmp_path / "alone")


MEMBERS = {
    "bloom": options(
        model__position="alibi", model__norm="layer", model__bias="all", model__mlp="gelu", model__embedding_norm="true"
    ),
    "palm": options(
        model__parallel_block="true", model__norm="layer-scale", model__logit_scale=0.2, objective__z_loss=1e-3
    ),
    "qwen3": options(model__qk_norm="true", model__bias="qkv", model__sliding_window=8),
    "documents": options(data__mask_documents="true", model__nope_interval=2),
    "glm": options(
        model__position="learned-2d", model__norm="layer", model__bias="all", model__mlp="gelu", model__objective="glm"
    ),
    "chatglm": options(
        model__position="rope-2d", model__residual="norm", model__norm="layer", model__bias="all", model__mlp="gelu",
        model__objective="glm",
    ),
}  # fmt: skip


@pytest.mark.slow
def test_members_of_the_family(tiny_config: Make, tmp_path: Path) -> None:
    """Of sequences that two processes do not divide."""
    common = options(
        train__steps=4, validate__every=4, model__vocab_size=301, sample__max_new_tokens=4, train__context=31
    )
    members = {name: [*words, *common] for name, words in MEMBERS.items()}
    compare(2, tiny_config, tmp_path, members, ["data 2", "shard 2", "tensor 2"])
    recurrent = options(
        model__mixer="wkv", model__mlp="channel-mix", model__position="none", model__norm="layer", model__init="rwkv",
        model__embedding_norm="true", model__n_kv_heads=4,
    )  # fmt: skip
    compare(2, tiny_config, tmp_path, {"rwkv": [*recurrent, *common]}, ["data 2", "shard 2"])


@pytest.mark.slow
def test_bfloat16_and_muon(tiny_config: Make, tmp_path: Path) -> None:
    words = options(train__steps=4, validate__every=4, model__vocab_size=301, sample__max_new_tokens=4)
    muon = {"muon": [*words, *options(optim__muon_lr=1e-2)]}
    # orthogonalization brings small singular values, and their rounding, to the size of the large ones;
    # where the processor has bfloat16 its products round at 2^-9
    compare(2, tiny_config, tmp_path, muon, ["data 2", "shard 2", "tensor 2"], tolerance=1e-3)
    low = {"bfloat16": [*words, *options(train__dtype="bfloat16")]}
    compare(2, tiny_config, tmp_path, low, ["data 2", "shard 2", "tensor 2"], tolerance=2e-2)


@pytest.fixture
def base(tiny_config: Make, tmp_path: Path) -> Path:
    config = tiny_config(*options(train__steps=2, model__vocab_size=301))
    assert train(config, str(tmp_path / "base"), report=SilentReport()) == 0
    return tmp_path / "base/model"


@pytest.mark.slow
def test_fine_tuning_and_preferences(tiny_config: Make, base: Path, tmp_path: Path) -> None:
    pairs, talks = tmp_path / "pairs.jsonl", tmp_path / "talks.jsonl"
    words = ["lamp", "tower", "cart", "fish", "hill"]
    asked = [
        (f"Say {words[i % 5]} {i}.", f"The {words[i % 5]}." * (1 + i % 3), f"{i} {words[i % 5]}s!") for i in range(24)
    ]
    pairs.write_text("".join(json.dumps({"prompt": q, "chosen": a, "rejected": b}) + "\n" for q, a, b in asked))
    talks.write_text("".join(json.dumps({"instruction": q, "input": "", "output": a}) + "\n" for q, a, _ in asked))
    common = options(
        train__init_from=base, data__template="vicuna", data__val_fraction=0.3, train__micro_batch_size=1,
        optim__lr=1e-3, train__steps=4, validate__every=4, train__context=32,
    )  # fmt: skip
    lora = options(lora__rank=4)
    found = {"sft": [*common, *options(data__sources=talks)]}
    found["lora"] = [*found["sft"], *lora]
    for name in ("dpo", "kto", "reward"):
        found[name] = [*common, *options(data__sources=pairs, objective__name=name)]
    found["dpo lora"] = [*found["dpo"], *lora]
    compare(2, tiny_config, tmp_path, found, ["data 2", "shard 2", "tensor 2"])


@pytest.mark.slow
def test_adapters_of_whole_layers_are_saved_as_they_were_trained(tiny_config: Make, base: Path, tmp_path: Path) -> None:
    """FSDP leaves embedding and head cast to bfloat16 after the validation that ends a run."""
    words = options(train__init_from=base, lora__rank=4, train__dtype="bfloat16", train__steps=2, validate__every=2)
    words += ["--lora.modules_to_save", "embed_tokens", "lm_head", "--sample.max_new_tokens", "0"]
    spawn(2, [Job(tiny_config(*words, *on("shard 2")), tmp_path / "run")])
    saved = load_file(tmp_path / "run/model/adapter_model.safetensors")
    whole = {name: weight for name, weight in saved.items() if "lora" not in name}
    assert len(whole) == 2
    assert not [name for name, weight in whole.items() if torch.equal(weight, weight.bfloat16().float())]


@pytest.mark.slow
def test_four_processes(tiny_config: Make, tmp_path: Path) -> None:
    common = options(train__steps=4, validate__every=4, model__vocab_size=301, model__n_kv_heads=4, train__batch_size=8)
    variants = {"tied": [*common, *options(model__tie_embeddings="true", train__micro_batch_size=1)]}
    variants["untied"] = [*common, *MORE]
    meshes = ["data 2, shard 2", "data 2, tensor 2", "shard 2, tensor 2", "shard 4", "tensor 4", "data 4"]
    compare(4, tiny_config, tmp_path, variants, meshes)
    low = {"bfloat16": [*common, *options(train__dtype="bfloat16")]}
    compare(4, tiny_config, tmp_path, low, meshes[:3], tolerance=2e-2)


@pytest.mark.slow
def test_four_processes_with_fractional_weights(tiny_config: Make, base: Path, tmp_path: Path) -> None:
    """Of messages, so that no two rows have the same sum, and some have next to nothing."""
    talks, words = tmp_path / "talks.jsonl", ["lamp", "tower", "cart", "fish", "hill"]

    def talk(i: int) -> list[dict[str, object]]:
        asked = {"role": "user", "content": f"Say {words[i % 5]}."}
        weights = (0.37 + 0.11 * (i % 7), 0.001 if i % 4 else 2.5)
        return [
            message
            for weight in weights[: 1 + i % 3]
            for message in (asked, {"role": "assistant", "content": words[i % 5] * (1 + i % 3), "weight": weight})
        ]

    talks.write_text("".join(json.dumps({"messages": talk(i)}) + "\n" for i in range(40)))
    common = options(
        train__init_from=base, data__template="plain", data__val_fraction=0.2, train__micro_batch_size=1,
        train__batch_size=8, optim__lr=1e-3, train__steps=4, validate__every=4, train__context=32, data__sources=talks,
        sample__max_new_tokens=0,
    )  # fmt: skip
    compare(4, tiny_config, tmp_path, {"sft": common}, ["data 2, shard 2", "shard 2, tensor 2"])


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_four_and_back(tiny_config: Make, tmp_path: Path) -> None:
    """Parts of two axes of one tensor among them, of a vocabulary that divides by neither."""
    words = options(
        train__steps=4, validate__every=4, model__vocab_size=301, model__n_kv_heads=4, sample__max_new_tokens=0
    )
    on_mesh = {mesh: tiny_config(*words, *on(mesh)) for mesh in ("shard 2", "shard 2, tensor 2", "shard 4")}
    assert train(tiny_config(*words), str(tmp_path / "alone"), report=SilentReport()) == 0
    two, four = tmp_path / "two", tmp_path / "four"
    spawn(2, [Job(on_mesh["shard 2"], two, stop=2)])
    more = [Job(on_mesh[mesh], tmp_path / f"on {mesh}", source=two) for mesh in ("shard 2, tensor 2", "shard 4")]
    spawn(4, [*more, Job(on_mesh["shard 2, tensor 2"], four, stop=2)])
    spawn(2, [Job(on_mesh["shard 2"], tmp_path / "back", source=four)])
    assert train(tiny_config(*words), str(four), resume=True, report=SilentReport()) == 0
    for out in (*(job.out for job in more), tmp_path / "back", four):
        assert_equal(out, tmp_path / "alone")


@pytest.mark.slow
def test_rollouts(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    common = options(train__micro_batch_size=2, train__steps=5, validate__every=5)
    variants = {name: [*feedback(start, *which), *common] for name, which in (("grpo", GRPO), ("ppo", PPO))}
    odd, name = tmp_path / "odd.py", "int(os.environ.get('RANK', 0))"  # a reward that no two processes give alike
    odd.write_text(f"import os\n\ndef f(prompt, ids, text, record):\n    return sum(ids) * (1 + 2 * {name}) % 7\n")
    given = variants["grpo"]
    at = given.index("verified")
    variants["odd"] = [*given[:at], f"{odd}:f", *given[at + 2 :]]
    compare(2, tiny_config, tmp_path, variants, ["data 2"])
