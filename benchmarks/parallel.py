"""Training steps by several processes of one thread beside one process of as many: tokens per second, communication.

    python benchmarks/parallel.py [--shapes tiny default 15m] [--processes 2] [--seconds 5] [--repeats 3]

A step is what a run's is: forward, backward, reduction, clipping and AdamW, on random tokens, eager, without the C++
kernels, which divided models do not have. Every measurement is a set of processes of its own; settings take turns, and
medians over the repeats are shown. `communication` is the first process's time in collectives, waiting for the other
ones among it, as a share of further steps. Results go to parallel.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from contention import OWN
from torch import Tensor, distributed, nn

from minillama.config import ModelConfig
from minillama.device import choose_dtype
from minillama.model import Decoder
from minillama.runs.config import RunConfig
from minillama.runs.parallel import ParallelConfig
from minillama.runs.sections import OptimConfig, TrainConfig
from minillama.threads import adapt
from minillama.training.gradients import accumulate, clip
from minillama.training.objectives import Batch
from minillama.training.optim.groups import make_optimizers
from minillama.training.parallel import Parallel, processes
from minillama.training.precision import choose_precision

MESHES = ("one", "data", "shard", "tensor")
# FSDP's were called `_tensor` before torch 2.13
COLLECTIVES = (
    *("all_reduce", "broadcast_object_list", "all_gather", "all_to_all_single"),
    *("all_gather_single", "reduce_scatter_single"),
    *("all_gather_into_tensor", "reduce_scatter_tensor"),
)


class Random:
    """Next tokens of random ones."""

    def __init__(self, model: nn.Module) -> None:
        self.models: Mapping[str, nn.Module] = {"model": model}

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        model = self.models["model"]
        return {"loss": model.loss(model.hidden(batch.tokens), batch.targets, batch.weights)}, {}


def child(shape: str, mesh: str, dtype: torch.dtype, seconds: float, threads: int) -> None:
    """Steps for so many seconds; a line of JSON from the first process."""
    torch.set_num_threads(threads)
    size, count = OWN[shape], int(os.environ["WORLD_SIZE"])
    axes = {} if mesh == "one" else {mesh: count}
    train = TrainConfig(batch_size=size.batch, compile="false", context=size.context)
    config = RunConfig(model=size.config(), train=train, parallel=ParallelConfig(**axes))
    with processes(config) as parallel:
        step = make_step(config.model, dtype, parallel)
        ids = torch.randint(0, size.vocab, (size.batch, size.context + 1), generator=torch.Generator().manual_seed(1))
        whole = Batch(ids[:, :-1], ids[:, 1:], torch.ones(size.batch, size.context))
        batch = whole.share(parallel.ranks.rank, parallel.ranks.world)
        for _ in range(3):
            step(batch)
        began, steps = time.perf_counter(), 0
        while parallel.ranks.leaders(time.perf_counter() - began) < seconds:
            step(batch)
            steps += 1
        taken = (time.perf_counter() - began) / steps
        spent = timed_collectives()
        began = time.perf_counter()
        for _ in range(3):
            step(batch)
        share = sum(spent) / (time.perf_counter() - began)
        if parallel.ranks.leads:
            print(json.dumps({"tokens_per_second": size.batch * size.context / taken, "communication": share}))


def timed_collectives() -> list[float]:
    """Seconds of each collective from now on."""
    spent: list[float] = []

    def timed(function: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **options: object) -> object:
            began = time.perf_counter()
            found = function(*args, **options)
            spent.append(time.perf_counter() - began)
            return found

        return run

    for name in COLLECTIVES:
        if hasattr(distributed, name):
            setattr(distributed, name, timed(getattr(distributed, name)))
    return spent


def make_step(config: ModelConfig, dtype: torch.dtype, parallel: Parallel):
    """A step of training."""
    master = Decoder(config)
    master.init_weights(torch.Generator().manual_seed(1))
    parallel.divide(master, dtype)
    optimizers = make_optimizers(master, OptimConfig(muon_lr=0.0))
    precision = choose_precision(master, torch.float32 if parallel.casts else dtype)
    objective = Random(precision.model)

    def step(batch: Batch) -> None:
        accumulate(objective, batch, len(batch.tokens), torch.device("cpu")).summed(parallel.ranks)
        parallel.ranks.sum_gradients(master.parameters())
        clip({"model": master}, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        precision.refresh()

    return step


def measure(shape: str, mesh: str, dtype: str, count: int, seconds: float) -> dict[str, float]:
    """A set of processes."""
    world, threads = (1, count) if mesh == "one" else (count, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        own = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = ["--child", shape, mesh, dtype, str(seconds), str(threads)]
        command = [sys.executable, __file__, *words]
        environment = os.environ | own | {"OMP_NUM_THREADS": str(threads)}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    texts = [process.communicate(timeout=600)[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{shape}, {mesh}: a process failed")
    return json.loads(texts[0].strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "default", "15m"], choices=OWN)
    parser.add_argument("--meshes", nargs="+", default=MESHES, choices=MESHES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["auto"], choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=5)
    args = parser.parse_args()
    if args.child:
        adapt()
        shape, mesh, dtype, seconds, threads = args.child
        child(shape, mesh, choose_dtype(dtype, torch.device("cpu")), float(seconds), int(threads))
        return
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(args.repeats):
        for dtype in args.dtypes:
            for shape in args.shapes:
                for mesh in args.meshes:
                    one = measure(shape, mesh, dtype, args.processes, args.seconds)
                    for name, value in one.items():
                        found.setdefault(f"{shape} {dtype} {mesh}", {}).setdefault(name, []).append(value)
    result = {key: {name: statistics.median(v) for name, v in values.items()} for key, values in found.items()}
    for key, values in result.items():
        print(f"{key:24} {values['tokens_per_second']:10.0f} tokens/s, communication {values['communication']:.0%}")
    Path("parallel.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
