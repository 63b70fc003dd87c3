"""A run of several processes, one of which is killed again and again, beside one that is not: the same bits at the end.

    python benchmarks/kills.py [--kills 20] [--processes 2] [--mesh shard] [--steps 6000] [--seed 0]

torchrun restarts all processes, and they go on from the newest checkpoint (`--max-restarts`, `--resume`). After a
random time, up to twice what a start takes, a random process gets signal 9, wherever it is: loading, in a step, in a
collective, writing its part of a checkpoint. A kill counts if the process was alive and the run had not recorded its
last step by then; others are told apart. The run is over when all steps are taken; then the weights are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from minillama.runs.checkpoint import steps

ROOT = Path(__file__).parents[1]
SMALL = "--model.dim 32 --model.n_layers 2 --model.n_heads 4 --model.n_kv_heads 2 --model.hidden_dim 64 "
SMALL += "--model.vocab_size 512 --model.max_seq_len 64 --train.batch_size 8 --sample.max_new_tokens 0"


def command(out: Path, args: argparse.Namespace) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(args.processes), "--max-restarts", str(args.kills + 1)]
    words = [str(ROOT / "train.py"), *SMALL.split(), "--data.sources", str(ROOT / "docs")]
    words += ["--out", str(out), "--resume", "--train.steps", str(args.steps)]
    words += [f"--parallel.{args.mesh}", str(args.processes)]
    return [*launcher, *words, "--checkpoint.every", "20", "--validate.every", "1000"]


def living(process: int) -> list[int]:
    """Processes that one has started and that have not ended, as Linux lists them."""
    found = Path(f"/proc/{process}/task/{process}/children")
    started = found.read_text().split() if found.exists() else []
    states = {int(word): Path(f"/proc/{word}/stat") for word in started}
    return [child for child, file in states.items() if file.exists() and ") Z " not in file.read_text()]


def recorded(out: Path) -> int:
    """Last step in the metrics; 0 before the first."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    whole = [line for line in lines if line.endswith("}")]
    return json.loads(whole[-1])["step"] if whole else 0


def run(out: Path, args: argparse.Namespace, kills: int) -> tuple[int, int, float]:
    """Kills before the last step and after it, and the seconds until the run was over."""
    dice, before, after, began, start = random.Random(args.seed), 0, 0, time.perf_counter(), 0.0
    with open(out.with_suffix(".log"), "w", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command(out, args), stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            if not start and steps(out / "checkpoints"):
                start = time.perf_counter() - began
            if start and before < kills and not after:
                time.sleep(dice.uniform(0, 2 * start))
                if victims := living(process.pid):
                    os.kill(dice.choice(victims), signal.SIGKILL)
                    step = recorded(out)  # read after the kill, so that none counts that came too late
                    before, after = before + (step < args.steps), after + (step >= args.steps)
                    print(f"kill {before + after} at step {step}", flush=True)
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the run failed, see {out.with_suffix('.log')}")
    return before, after, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--mesh", default="shard", choices=["data", "shard", "tensor"])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    found = {}
    for name, kills in (("whole", 0), ("killed", args.kills)):
        before, after, seconds = run(folder / name, args, kills)
        found[name] = load_file(folder / name / "model/model.safetensors")
        print(f"{name}: {before} kills before the last step, {after} after it, {seconds:.0f} s", flush=True)
    one, other = found.values()
    same = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    print(f"{'the same bits' if same else 'OTHER BITS'}; the runs are in {folder}")
    if before < args.kills:
        raise SystemExit(f"the run was over after {before} of {args.kills} kills: give more --steps")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
