"""Meshes that are refused or chosen, and the memory per process that they are chosen by."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing
from torch._C._profiler import _ExtraFields_Allocation
from torch.autograd.profiler import profile

from minillama.config import ModelConfig
from minillama.config.cost import training_memory
from minillama.errors import InputError
from minillama.model import Decoder
from minillama.runs.config import RunConfig
from minillama.runs.memory import GIB, _start_bytes, checkpoint_copy, needed_memory, peak_memory
from minillama.runs.parallel import ParallelConfig, Sizes
from minillama.training.optim.groups import make_optimizers
from minillama.training.parallel import Parallel, processes, sizes
from minillama.training.run import _why
from minillama.training.sharded import local
from minillama.training.trainer import RANK

from .test_parallel import free_port, options

Make = Callable[..., RunConfig]
MUON = options(optim__muon_lr=0)


@pytest.mark.parametrize(
    ("words", "count", "where"),
    [
        (options(parallel__shard=2), 1, "parallel"),
        (options(parallel__shard=2, parallel__data=2), 2, "parallel"),
        (options(train__batch_size=3), 2, "train.batch_size"),
        (options(parallel__tensor=4, model__n_kv_heads=2), 4, "model.n_kv_heads"),
        (options(parallel__tensor=3, model__n_heads=3, model__n_kv_heads=3, model__dim=24, model__hidden_dim=3), 3, ""),
        (options(parallel__tensor=4, model__n_kv_heads=4, model__hidden_dim=6), 4, "model.hidden_dim"),
        (options(parallel__shard=2, optim__optimizer="adafactor", optim__muon_lr=0), 2, "optim.optimizer"),
        (options(parallel__shard=2, train__compile="true"), 2, "train.compile"),
        (
            options(
                parallel__tensor=2, model__mixer="wkv", model__mlp="channel-mix", model__position="none",
                model__n_kv_heads=4, model__norm="layer",
            ),
            2,
            "model.mixer",
        ),
    ],
)  # fmt: skip
def test_meshes_that_cannot_be_are_refused(tiny_config: Make, words: list[str], count: int, where: str) -> None:
    config = tiny_config(*words)
    if not where:
        assert sizes(config, count).tensor == 3
        return
    with pytest.raises(InputError) as refused:
        sizes(config, count)
    assert refused.value.where == where and (refused.value.fix or refused.value.expected)


def test_a_value_model_of_another_shape_divides_too(tiny_config: Make, tmp_path: Path) -> None:
    """Whether it is a whole model or an adapter, which has the shape of its base."""
    shape = ModelConfig(dim=24, n_layers=1, n_heads=6, n_kv_heads=3, hidden_dim=8, vocab_size=257, max_seq_len=32)
    recurrent = replace(shape, mixer="wkv", mlp="channel-mix", position="none", norm="layer", n_kv_heads=6)
    for name, made in (("three", shape), ("recurrent", recurrent)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(made.to_hf()))
    (tmp_path / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "three"), "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(adapter | {"target_modules": ["q_proj"]}))
    common = options(data__template="plain", objective__name="ppo", objective__max_new_tokens=4, parallel__tensor=2)
    for name, where in (("three", "n_kv_heads"), ("adapter", "n_kv_heads"), ("recurrent", "mixer")):
        words = [*common, *options(objective__critic_from=tmp_path / name)]
        with pytest.raises(InputError) as refused:
            sizes(tiny_config(*words), 2)
        assert refused.value.where == f"objective.critic_from.{where}" and (refused.value.fix or refused.value.expected)
        assert sizes(tiny_config(*words, "--parallel.tensor", "1"), 2) == Sizes(2)
    shared = tiny_config(*common, "--objective.critic", "shared")
    assert sizes(shared, 2) == Sizes(1, 1, 2)


@pytest.mark.parametrize(("name", "reason"), [("pipeline", "idle"), ("context", "no sharding strategy")])
def test_what_is_not_there_is_refused_with_the_reason(tiny_config: Make, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        tiny_config(*options(**{f"parallel__{name}": 2}))


def test_auto_divides_as_little_as_fits(tiny_config: Make) -> None:
    deep = options(model__n_layers=24, model__n_kv_heads=4, parallel__auto="true", train__batch_size=8)
    config = tiny_config(*deep)
    meshes = [Sizes(4), Sizes(2, 2), Sizes(1, 4), Sizes(1, 2, 2)]

    def need(mesh: Sizes) -> int:
        return peak_memory(config, torch.float32, torch.device("cpu"), mesh)

    assert need(meshes[0]) > need(meshes[1]) > need(meshes[2])
    assert need(meshes[0]) > needed_memory(config, torch.float32, 2, meshes[0]).total  # and a checkpoint's copy
    assert [sizes(config, 4, need(mesh)) for mesh in meshes[:3]] == meshes[:3]
    # nothing fits: what needs the least, and it is said so
    least = sizes(config, 4, 0)
    assert need(least) == min(map(need, meshes)) and least.parts == 4
    fits = f"the least division that fits in {need(least) / GIB:.2f} GiB per process"
    assert _why(Parallel(least, free=need(least)), need(least)).endswith(fits)
    said = _why(Parallel(least, free=need(least) - 1), need(least))
    assert "needs the least" in said and "that fits" not in said
    refused = tiny_config(*deep, *options(optim__optimizer="adafactor", optim__muon_lr=0))
    assert sizes(refused, 4, 0) == meshes[0]


def test_the_memory_of_rollouts_is_that_of_a_whole_copy_and_a_critic(tiny_config: Make) -> None:
    """However the trained models are divided; the reference is divided as they are."""
    count = tiny_config().model.num_params()

    def need(mesh: Sizes, *words: str) -> int:
        return needed_memory(tiny_config(*words), torch.bfloat16, 2, mesh).total

    feedback = options(data__template="plain", objective__max_new_tokens=4)
    grpo = [*feedback, *options(objective__name="grpo", objective__samples=2)]
    ppo = [*feedback, *options(objective__name="ppo")]
    for mesh in (Sizes(1), Sizes(1, 2), Sizes(1, 1, 2), Sizes(1, 4)):
        assert need(mesh, *grpo) == need(mesh) + 2 * count
        reference = 2 * count // mesh.parts
        assert need(mesh, *grpo, "--objective.kl", "k3") == need(mesh) + 2 * count + reference
        shared = need(mesh, *ppo, "--objective.critic", "shared")
        assert shared == need(mesh) + 2 * count + reference
        assert need(mesh, *ppo) > shared + 16 * count / mesh.parts


def test_what_is_built_whole_at_the_start_counts(tiny_config: Make) -> None:
    """Policy, reference and value model, before each process keeps its part; and a checkpoint has two of them."""
    config = tiny_config(*options(data__template="plain", objective__name="ppo", objective__max_new_tokens=4))
    count, device = config.model.num_params(), torch.device("cpu")
    assert _start_bytes(config, Sizes(1, 64)) == 12 * count <= peak_memory(config, torch.bfloat16, device, Sizes(1, 64))
    assert _start_bytes(config, Sizes(1)) == 0
    alone = tiny_config(*options(data__template="plain"))
    assert checkpoint_copy(config, device) == checkpoint_copy(alone, device) + 12 * count


SHAPE = ModelConfig(dim=192, n_layers=4, n_heads=6, n_kv_heads=2, vocab_size=1024, max_seq_len=128)
SHAPES = {
    "grouped": SHAPE,
    "wide vocabulary": replace(SHAPE, vocab_size=4096, n_layers=2),
    "deep and tied": replace(SHAPE, n_layers=8, dim=96, head_dim=16, hidden_dim=256, tie_embeddings=True),
    "checkpointed": replace(SHAPE, n_layers=24, hidden_dim=192),
}


def measure(rank: int, port: int, out: Path) -> None:
    """Bytes that torch allocates, at most at once, in a step of two micro-batches, by shape and mesh."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {}
    for name, shape in SHAPES.items():
        for axis in ("data", "shard", "tensor"):
            config = RunConfig(model=shape, parallel=ParallelConfig(**{axis: 2}))
            with processes(config) as parallel:
                found[f"{name}, {axis}"] = peak(shape, parallel, name == "checkpointed")
    if rank == 0:
        out.write_text(json.dumps(found))
    distributed.destroy_process_group()


def peak(shape: ModelConfig, parallel: Parallel, checkpointing: bool) -> int:
    model = Decoder(shape)
    model.checkpointing = checkpointing
    parallel.divide(model, torch.float32)
    (optimizer,) = make_optimizers(model, replace(RunConfig().optim, muon_lr=0.0))

    def step() -> None:
        for _ in range(2):
            tokens = torch.randint(0, shape.vocab_size, (8, 128), generator=torch.Generator().manual_seed(1))
            model.loss(model.hidden(tokens), tokens).backward()
        parallel.ranks.sum_gradients(model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    tensors = [local(t.detach()) for t in (*model.parameters(), *model.buffers(), *states)]
    kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    with profile(profile_memory=True) as recorded:
        step()
    assert recorded.kineto_results is not None
    return kept + most_at_once(recorded.kineto_results.experimental_event_tree())


def most_at_once(roots: list[Any]) -> int:
    """Bytes allocated, at most at once, in a step that keeps nothing.

    A buffer that gloo's threads free is not seen to go: it is counted until its address is given out again, and
    not at all where it never is.
    """
    changes = sorted(
        (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in tree(roots)
        if isinstance(event.extra_fields, _ExtraFields_Allocation)
    )
    sizes, begun = [0] * len(changes), dict[int, int]()
    for when, (_, address, size) in enumerate(changes):
        start = begun.pop(address, None)
        if start is not None:
            sizes[start] += changes[start][2]
            sizes[when] -= changes[start][2]
        if size > 0:
            begun[address] = when
    return max(accumulate(sizes))


def tree(roots: list[Any]) -> Iterator[Any]:
    for event in roots:
        yield event
        yield from tree(event.children)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_the_peak_per_process_is_what_was_said(tmp_path: Path) -> None:
    multiprocessing.spawn(measure, (free_port(), tmp_path / "found.json"), nprocs=2)
    found = json.loads((tmp_path / "found.json").read_text())
    said = {}
    for name, shape in SHAPES.items():
        for axis, mesh in {"data": {}, "shard": {"shard": 2}, "tensor": {"tensor": 2}}.items():
            said[f"{name}, {axis}"] = training_memory(shape, 8, 128, checkpointing=name == "checkpointed", **mesh).total
    ratios = {name: round(said[name] / found[name], 3) for name in said}
    assert not {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > 0.10}


FAKE = """
import json, math, sys
from datetime import timedelta
from itertools import accumulate
from torch.autograd.profiler import profile
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from minillama.config import ModelConfig
from minillama.model import Decoder
from minillama.formats.open import open_model
from minillama.runs.config import RunConfig
from minillama.runs.parallel import Sizes
from minillama.training.init_model import Start
from minillama.training.parallel import _parallel
from minillama.training.sharded import local

distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
found = {}
for data, shard, tensor in ((1, 64, 1), (1, 8, 8), (1, 16, 4), (2, 32, 1)):
    made = _parallel(Sizes(data, shard, tensor), "cpu", math.inf, timedelta(seconds=60))
    with torch.device("meta"):
        model = Decoder(ModelConfig.load("llama-2-70b"))
    made.divide(model, torch.bfloat16)
    found[f"{shard} x {tensor}"] = 4 * sum(local(p.detach()).numel() for p in model.parameters())
    assert made.mesh.device_type == "cpu"  # FSDP over gloo on a machine with GPUs: pytorch issues/132471
made = _parallel(Sizes(1, 64), "cpu", math.inf, timedelta(seconds=60))
start = open_model(sys.argv[1])
run = Start(RunConfig(model=start.config), torch.device("cpu"), torch.float32, None, start)
with profile(profile_memory=True) as recorded:
    model = run.build_model(made)
changes = [event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]"]
found["peak"] = max(accumulate(changes))
print(json.dumps(found))
"""


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_64_processes_divide_70b_as_the_plan_says_and_read_no_whole_model(tmp_path: Path) -> None:
    small = ModelConfig(dim=256, n_layers=12, n_heads=8, vocab_size=1024, max_seq_len=64, tie_embeddings=True)
    Decoder(small).save_pretrained(tmp_path)
    words = [sys.executable, "-c", FAKE, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    block = 4 * sum(math.prod(shape) for shape in small.layer_tensors().values())
    # the own part, and a block that is gathered: FSDP has it flat and by tensor
    assert found["peak"] < 4 * small.num_params() / 64 + 2.5 * block < 4 * small.num_params() / 4
    shape = ModelConfig.load("llama-2-70b")
    for shard, tensor in ((64, 1), (8, 8), (16, 4), (32, 1)):  # the last two are those of `minillama plan`
        said = training_memory(shape, 1, 4096, shard=shard, tensor=tensor).weights
        assert found[f"{shard} x {tensor}"] == pytest.approx(said, rel=1e-3)


def test_processes_draw_other_dropout_masks() -> None:
    masks = []
    for rank in range(4):
        torch.manual_seed(7 + rank * RANK)
        masks.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
    assert len({tuple(mask.tolist()) for mask in masks}) == 4
    torch.manual_seed(7)
    assert torch.equal(masks[0], torch.nn.functional.dropout(torch.ones(64), 0.5))
