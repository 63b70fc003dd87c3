"""Seconds until a validation loss is reached, everything counted: interpreter, imports, data, evaluations.

    python benchmarks/time_to_loss.py TEXT [--nanogpt CLONE] [--config NAME] [--target 1.8857]

TEXT is tinyshakespeare.txt. The run trains on its first nine tenths of characters and scores the whole last
tenth at the model's own context. With --nanogpt, the CPU recipe of a clone of karpathy/nanoGPT (README,
"I only have a macbook", with its own data script) runs right after it on the same machine; that recipe
estimates its loss from 20 random batches. Both curves are printed and written to time_to_loss.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NANOGPT = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0"
)
Curve = list[tuple[float, int, float]]  # seconds, step, validation loss


def watch(command: list[str], pattern: str, began: float, cwd: Path | None = None) -> Curve:
    """Run a command and note when it prints a validation loss."""
    curve: Curve = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd)
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(pattern, line):
            curve.append((time.perf_counter() - began, int(match[1]), float(match[2])))
            print(f"  {curve[-1][0]:7.1f} s  step {curve[-1][1]:5}  val_loss {curve[-1][2]:.4f}", flush=True)
    if process.wait():
        raise SystemExit(f"{command[0]} failed with status {process.returncode}")
    return curve


def ours(config: str, text: Path) -> Curve:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "minillama", "train", config, "--data.sources", str(text)]
        command += ["--out", f"{folder}/run", "--data.cache", f"{folder}/cache"]
        return watch(command, r"step (\d+): .*val_loss ([\d.]+)", time.perf_counter())


def nanogpt(clone: Path, text: Path) -> Curve:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "nanoGPT"
        shutil.copytree(clone, work, ignore=shutil.ignore_patterns(".git", "*.bin"))
        shutil.copy(text, work / "data" / "shakespeare_char" / "input.txt")
        began = time.perf_counter()
        subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=work, check=True, capture_output=True)
        command = [sys.executable, "train.py", *NANOGPT.split()]
        return watch(command, r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", began, work)


def reached(curve: Curve, target: float) -> float | None:
    return next((seconds for seconds, _, loss in curve if loss <= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--config", default="shakespeare-char")
    parser.add_argument("--nanogpt", type=Path, help="a clone of karpathy/nanoGPT (it needs numpy, requests, torch)")
    parser.add_argument("--target", type=float, default=1.8857)
    parser.add_argument("--json", type=Path, default=Path("time_to_loss.json"))
    args = parser.parse_args()
    print(f"minillama {args.config}", flush=True)
    curves = {"minillama": ours(args.config, args.text)}
    if args.nanogpt is not None:
        print("nanoGPT, CPU recipe", flush=True)
        curves["nanoGPT"] = nanogpt(args.nanogpt, args.text)
    times = {name: reached(curve, args.target) for name, curve in curves.items()}
    for name, seconds in times.items():
        print(f"{name}: {args.target} " + ("not reached" if seconds is None else f"after {seconds:.1f} s"))
    first, second = times["minillama"], times.get("nanoGPT")
    if first and second:
        print(f"ratio: {first / second:.2f}")
    args.json.write_text(json.dumps({"target": args.target, "reached": times, "curves": curves}, indent=2) + "\n")


if __name__ == "__main__":
    main()
