"""How long a checkpoint stops the training: the copy of the tensors, beside writing them at once.

    python benchmarks/saving.py [--preset stories42m] [--repeats 5]

Weights and both moments of AdamW in float32, medians; bytes are those of the checkpoint. `submit` is what a step
waits for, `copy` the same tensors copied and nothing else, `write` a checkpoint written, hashed and put on the disk
while the process waits. Results go to saving.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from minillama.config import ModelConfig
from minillama.formats import hf
from minillama.model import Decoder
from minillama.runs.checkpoint import CheckpointCopy, save_checkpoint
from minillama.runs.report import PlainReport
from minillama.runs.writer import CheckpointWriter
from minillama.threads import adapt
from minillama.training.sharded import gathered


def seconds(call: Callable[[int], object], repeats: int) -> float:
    times = []
    for i in range(repeats + 1):  # the first warms up
        began = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="stories42m")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model = Decoder(ModelConfig.load(args.preset))
    weights = model.state_dict()
    moments = {
        f"{name}/{part}": torch.randn_like(t) for name, t in weights.items() for part in ("exp_avg", "exp_avg_sq")
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def write_model(path: Path, tensors: dict[str, torch.Tensor]) -> None:
            hf.write(path, model.config, tensors)

        writer = CheckpointWriter(place / "a", 1, write_model, PlainReport(Console(quiet=True)))
        submitted = []
        for i in range(args.repeats + 1):
            began = time.perf_counter()
            writer.submit(lambda i=i: CheckpointCopy(gathered(weights, True), gathered(moments, True), {"step": i}))
            submitted.append(time.perf_counter() - began)
            writer.finish()  # as if the steps between two checkpoints took longer than the disk
        copy = seconds(lambda i: [t.clone() for t in (*weights.values(), *moments.values())], args.repeats)
        write = seconds(
            lambda i: save_checkpoint(place / "b", CheckpointCopy(weights, moments, {"step": i}), write_model),
            args.repeats,
        )
    found = {
        "preset": args.preset,
        "bytes": sum(t.numel() * t.element_size() for t in (*weights.values(), *moments.values())),
        "submit": statistics.median(submitted[1:]),
        "copy": copy,
        "write": write,
    }
    print("| model | MB | submit, ms | copy, ms | write, ms |\n|---|---|---|---|---|")
    times = " | ".join(f"{1000 * found[name]:.0f}" for name in ("submit", "copy", "write"))
    print(f"| {args.preset} | {found['bytes'] / 1e6:.0f} | {times} |")
    Path("saving.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    adapt()
    main()
