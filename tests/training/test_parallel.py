"""Several processes that train one model give what one process gives: losses, gradient norms and weights."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from minillama.runs.config import RunConfig
from minillama.runs.report import SilentReport
from minillama.training.run import train

Make = Callable[..., RunConfig]
Runs = Mapping[str, tuple[RunConfig, str, dict[str, Any]]]
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


def work(rank: int, world: int, port: int, runs: Runs) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, (config, out, options) in runs.items():
        try:
            assert train(config, out, report=SilentReport(), **options) == 0
        except BaseException as error:
            error.add_note(f"in the run {name}")
            raise
    distributed.destroy_process_group()


def spawn(world: int, runs: Runs) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (world, port, runs), nprocs=world)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next((out / "model").glob("*.safetensors")))


def assert_equal(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Losses, norms and measures of every step, and the final weights."""
    for a, b in zip(metrics(found), metrics(expected), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "tokens_per_second", "mfu", "sample", "rows", "skipped"}:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (found.name, a["step"], name)
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    for name in one:
        worst = (one[name] - other[name]).abs().max().item()
        assert worst <= 2 * tolerance, (found.name, name, worst)


def compare(world: int, make: Make, folder: Path, variants: Mapping[str, Sequence[str]], meshes: Sequence[str]) -> None:
    """Every variant on every mesh, as "shard 2", against one process."""
    runs: dict[str, tuple[RunConfig, str, dict[str, Any]]] = {}
    pairs = []
    for variant, words in variants.items():
        alone = folder / f"{variant} alone"
        assert train(make(*words), str(alone), report=SilentReport()) == 0
        for mesh in meshes:
            options = [word for pair in mesh.split(", ") for word in (f"--parallel.{pair}").split(" ")]
            out = folder / f"{variant} {mesh}"
            runs[out.name] = make(*words, *options), str(out), {}
            pairs.append((out, alone))
    spawn(world, runs)
    for out, alone in pairs:
        assert_equal(out, alone)


def test_two_processes_give_what_one_gives(tiny_config: Make, tmp_path: Path) -> None:
    words = ["--model.vocab_size", "301", "--train.steps", "6", "--validate.every", "3", "--optim.grad_clip", "0.5"]
    variants = {
        "tied": [*words, "--model.tie_embeddings", "true", "--train.micro_batch_size", "1"],
        "checkpointing": [*words, "--train.checkpointing", "true", "--metrics.every", "2"],
    }
    compare(2, tiny_config, tmp_path, variants, ["data 2", "shard 2", "tensor 2"])
