"""Every member of the family in its tiny size: the same recipe, parameters and tokens; bits per byte and time.

    python benchmarks/family.py [--steps 200] [--batch-size 8] [--members llama palm ...] [--figure docs/family.png]

Each is trained by `train.py --model.preset NAME-tiny` on the default text in a process of its own, one after the
other, and scored on the same held-out text from left to right (GLM and ChatGLM read it as one blank). Bits a byte,
not nats per token: GLM's vocabulary gives five places to its marks. Results go to family.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from minillama.config import ModelConfig
from minillama.evaluate.likelihood import score
from minillama.evaluate.perplexity import Score
from minillama.inference.generate import blanks_of
from minillama.model import Decoder
from minillama.runs.config import load_run_config
from minillama.runs.report import PlainReport
from minillama.threads import adapt
from minillama.training.data import load_data
from minillama.training.init_model import resolve

MEMBERS = ["llama", "palm", "bloom", "glm", "chatglm", "chatglm2", "rwkv"]
HELD_OUT = 40_000  # tokens


def measure(member: str, steps: int, rows: int, folder: Path) -> dict[str, float]:
    run = folder / member
    command = [sys.executable, "-m", "minillama", "train", "--model.preset", f"{member}-tiny", "--out", str(run)]
    command += ["--train.steps", str(steps), "--train.batch_size", str(rows), "--validate.every", str(steps)]
    command += ["--data.cache", str(folder / "cache"), "--sample.max_new_tokens", "0", "--checkpoint.every", str(steps)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    config = load_run_config(str(run / "config.toml"))
    data, tokenizer = load_data(config, resolve(config).tokenizer, PlainReport(Console(quiet=True)))
    model = Decoder.from_pretrained(run / "model")
    whole = Score(0.0, 0, 0.0)
    for split, windows in data.held_out(model.config.max_seq_len - 2, HELD_OUT):
        pairs = [[(window[:1].tolist(), window[1:].tolist())] for window in windows]
        nats = -sum(found[0].nats for _, found in score(model, pairs, blanks_of(model, tokenizer)))
        count = sum(len(after) for ((_, after),) in pairs)
        whole += Score(nats, count, count * split.bytes / split.tokens)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    seconds = sum(losses[-1]["tokens"] / steps / line["tokens_per_second"] for line in losses)
    speeds = sorted(line["tokens_per_second"] for line in losses)
    return {
        "parameters": ModelConfig.load(f"{member}-tiny").num_params(),
        "tokens": losses[-1]["tokens"],
        "bits_per_byte": whole.bits_per_byte,
        "seconds": seconds,
        "tokens_per_second": speeds[len(speeds) // 2],
        "own_loss_first": next(line["val_loss"] for line in lines if "val_loss" in line),
        "own_loss_last": next(line["val_loss"] for line in reversed(lines) if "val_loss" in line),
    }


def draw(path: Path, results: dict[str, dict[str, float]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, found in results.items():
        axes.plot(found["seconds"], found["bits_per_byte"], "o")
        axes.annotate(name, (found["seconds"], found["bits_per_byte"]), xytext=(6, 4), textcoords="offset points")
    tokens = next(iter(results.values()))["tokens"]
    axes.set(
        xlabel="seconds of training", ylabel="bits per byte, held out", title=f"{tokens:,} tokens, 3.5M parameters"
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--members", nargs="+", default=MEMBERS)
    parser.add_argument("--figure", type=Path, help="draw it here; needs matplotlib")
    parser.add_argument("--json", type=Path, default=Path("family.json"))
    args = parser.parse_args()
    results = {}
    print("| member | parameters | bits per byte | own loss | seconds | tokens/s |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for member in args.members:
            found = results[member] = measure(member, args.steps, args.batch_size, Path(folder))
            losses = f"{found['own_loss_first']:.2f} to {found['own_loss_last']:.2f}"
            print(
                f"| {member} | {found['parameters'] / 1e6:.2f}M | {found['bits_per_byte']:.3f} | {losses} | "
                f"{found['seconds']:.0f} | {found['tokens_per_second']:.0f} |",
                flush=True,
            )
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.figure is not None:
        draw(args.figure, results)


if __name__ == "__main__":
    adapt()
    main()
