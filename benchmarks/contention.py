"""Training and decoding beside other programs: as OpenMP's threads wait by themselves, and as minillama has them wait.

    python benchmarks/contention.py [--model SMOLLM2.gguf] [--workloads tiny default 15m decode] [--repeats 2]

Each workload is a process of its own that prints a line per step. Beside it run, in turn for --seconds each:
nothing, one busy loop, two, four, nothing again, and the same workload a second time (the speed shown is the first
one's). `before` has GOMP_SPINCOUNT at 300000, which is libgomp's own setting and turns `minillama.threads.adapt` off;
`after` is what every command does. The two take turns; medians over the repeats are shown, in tokens per second and as
a share of the row's quiet speed. Training is forward, backward, clipping and AdamW on random tokens, eager, with the
C++ that the processor takes; decoding is one sequence of --model. Results go to contention.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training import SHAPES, Shape, ours

OWN = {
    "tiny": Shape(64, 2, 4, 176, 2048, 64, 8),
    "default": Shape(256, 4, 4, 688, 2048, 256, 16),  # configs/train/tiny.toml
    "15m": SHAPES["15m"],
}
BESIDE = ("nothing", "1 loop", "2 loops", "4 loops", "nothing again", "itself")
SETTINGS = {"before": {"GOMP_SPINCOUNT": "300000"}, "after": {}}
SETTLE = 1.5  # seconds between a change and the measurement


def child(workload: str, model: str) -> None:
    """Steps without end, a line each: when it ended, and its tokens."""
    from minillama.threads import adapt

    adapt()
    steps = decoding(model) if workload == "decode" else training(OWN[workload])
    for tokens in steps:
        print(time.monotonic(), tokens, flush=True)


def training(shape: Shape) -> Iterator[int]:
    import torch

    step, _ = ours(shape, "native")
    ids = torch.randint(0, shape.vocab, (shape.batch, shape.context + 1))
    while True:
        step(ids)
        yield shape.batch * shape.context


def decoding(path: str) -> Iterator[int]:
    from minillama.inference.engine import Engine
    from minillama.inference.load import ModelArgs
    from minillama.inference.request import Request

    model, _ = ModelArgs(path).load("auto", True)
    engine = Engine(model)
    while True:
        engine.submit(Request(range(5, 37), 200))
        while engine.is_busy:
            engine.step()
            yield 1


@contextmanager
def running(command: list[str], count: int, env: dict[str, str] | None = None) -> Iterator[list[subprocess.Popen[str]]]:
    """So many processes of a command while the block runs."""
    environment = os.environ | (env or {})
    made = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        for _ in range(count)
    ]
    try:
        yield made
    finally:
        for process in made:
            process.kill()
            process.wait()


def measure(workload: str, setting: str, seconds: float, model: str) -> dict[str, float]:
    """Tokens per second beside each of `BESIDE`."""
    command = [sys.executable, __file__, "--child", workload, "--model", model]
    busy = [sys.executable, "-c", "while True: pass"]
    others = {"1 loop": (busy, 1), "2 loops": (busy, 2), "4 loops": (busy, 4), "itself": (command, 1)}
    found: dict[str, float] = {}
    with running(command, 1, SETTINGS[setting]) as (process,):
        ends: list[tuple[float, int]] = []
        reader = threading.Thread(target=lambda: ends.extend(map(parsed, process.stdout or ())), daemon=True)
        reader.start()
        while len(ends) < 4:
            alive(process)
        for name in BESIDE:
            other, count = others.get(name, (busy, 0))
            with running(other, count, SETTINGS[setting]) as started:
                for each in started if name == "itself" else ():
                    assert each.stdout is not None
                    each.stdout.readline()  # it has loaded, and takes its steps
                    threading.Thread(target=each.stdout.read, daemon=True).start()
                time.sleep(SETTLE)
                first = len(ends)
                until = time.monotonic() + seconds
                while time.monotonic() < until or len(ends) < first + 3:
                    alive(process)
                span = ends[first:]
                found[name] = sum(tokens for _, tokens in span[1:]) / (span[-1][0] - span[0][0])
    return found


def parsed(line: str) -> tuple[float, int]:
    when, tokens = line.split()
    return float(when), int(tokens)


def alive(process: subprocess.Popen[str]) -> None:
    """Wait a little."""
    if process.poll() is not None:
        raise SystemExit(f"{process.args} ended")
    time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=[*OWN])
    parser.add_argument("--model", default="", help="for decode: a model that decodes in C++")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("contention.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.model)
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"| workload | | {' | '.join(BESIDE)} |\n|---|---|{'---|' * len(BESIDE)}")
    for workload in args.workloads:
        runs: dict[str, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
        for _ in range(args.repeats):
            for setting in SETTINGS:
                runs[setting].append(measure(workload, setting, args.seconds, args.model))
        for setting, found in runs.items():
            middle = {name: statistics.median(run[name] for run in found) for name in BESIDE}
            results.setdefault(workload, {})[setting] = middle
            cells = [f"{speed:.0f} ({speed / middle['nothing']:.0%})" for speed in middle.values()]
            print(f"| {workload} | {setting} | {' | '.join(cells)} |", flush=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
