"""Maximal update parametrization: the coordinate check, and the best learning rate over widths, with muP and without.

    python benchmarks/mup.py coordinates [--widths 64 128 256 512] [--figure docs/coordinates.png]
    python benchmarks/mup.py rates [--widths 64 128 256 512] [--rates 1e-3 ...] [--figure docs/mup.png]

Both on the text of configs/train/scaling.toml, four layers, heads of 16, AdamW. `coordinates` prints the mean absolute
change of activations after some steps, and its exponent over the width. `rates` trains every width at every rate for
the same tokens, and prints held-out losses; finished runs in --out are not trained again, a stopped one goes on. The
base width's runs count for both parametrizations.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from minillama.config import ModelConfig
from minillama.data.corpus import Corpus
from minillama.runs.config import RunConfig, load_run_config
from minillama.runs.report import PlainReport
from minillama.scaling.points import read_runs
from minillama.scaling.sweep import Sweep
from minillama.threads import adapt
from minillama.training.coordinate_check import changes, slope
from minillama.training.data import load_data
from minillama.training.init_model import resolve
from minillama.training.run import train

BASE, HEAD, LAYERS = 64, 16, 4
KINDS = {"standard": 0, "muP": BASE}
Curves = Mapping[str, Mapping[int, Mapping[float, float]]]  # parametrization -> width -> rate -> loss


def here(path: Path, folder: Path) -> int:
    """`minillama train` without a process of its own, whose start would take longer than the small runs."""
    report = PlainReport(Console(quiet=True))
    return train(load_run_config(str(path)), str(folder), (folder / "config.toml").exists(), report=report)


def make(base: RunConfig, width: int, mup_base: int, lr: float, steps: int = 1, rows: int = 16) -> RunConfig:
    shape = {"dim": width, "n_layers": LAYERS, "n_heads": width // HEAD, "n_kv_heads": width // HEAD}
    model: ModelConfig = replace(base.model, **shape, head_dim=HEAD, hidden_dim=3 * width)
    return replace(
        base,
        name=f"{'mup' if mup_base and width != BASE else 'standard'}-{width}-{lr:g}",
        model=model,
        train=replace(base.train, steps=steps, batch_size=rows),
        optim=replace(
            base.optim, lr=lr, warmup_steps=max(1, steps // 20), mup_base_dim=mup_base if width != BASE else 0
        ),
        validate=replace(base.validate, every=steps, tokens=16_000),
        checkpoint=replace(base.checkpoint, every=steps, keep=1),
    )


def coordinates(args: argparse.Namespace, base: RunConfig) -> None:
    data, _ = load_data(base, resolve(base).tokenizer, PlainReport(Console(quiet=True)))
    assert isinstance(data, Corpus)
    rows = [torch.from_numpy(data.batch(0, step, 4, 128)) for step in range(args.steps)]
    print(f"| parametrization | activation | {' | '.join(map(str, args.widths))} | exponent |")
    print(f"|---|---|{'---|' * len(args.widths)}---|")
    found: dict[str, dict[str, list[float]]] = {}
    for kind, mup_base in KINDS.items():
        for width in args.widths:
            seeds = [changes(make(base, width, mup_base, args.rate), rows, seed) for seed in range(args.seeds)]
            for name in seeds[0]:
                mean = sum(one[name] for one in seeds) / len(seeds)
                found.setdefault(kind, {}).setdefault(name, []).append(mean)
        for name, values in found[kind].items():
            row = " | ".join(f"{value:.4g}" for value in values)
            print(f"| {kind} | {name} | {row} | {slope(args.widths, values):+.2f} |", flush=True)
    if args.figure:
        lines = {kind: {name: (args.widths, values) for name, values in one.items()} for kind, one in found.items()}
        draw(args.figure, lines, "width", f"mean absolute change after {args.steps} steps", log=True)


def rates(args: argparse.Namespace, base: RunConfig) -> None:
    sweep = Sweep(base, args.out, (1e12, 2e12), train=here)  # whose runs resume
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, dict[float, float]]] = {}
    for kind, mup_base in KINDS.items():
        print(f"\n| {kind} | {' | '.join(f'{rate:g}' for rate in args.rates)} | best |")
        print(f"|---|{'---|' * len(args.rates)}---|")
        for width in args.widths:
            losses = found.setdefault(kind, {}).setdefault(width, {})
            for rate in args.rates:
                config = make(base, width, mup_base, rate, args.steps, args.rows)
                if not sweep.finish(config, args.out / config.name):
                    raise SystemExit("the same command goes on")
                losses[rate] = read_runs([args.out / config.name]).points[0].loss
            best = min(losses, key=lambda rate: losses[rate])
            print(f"| {width} | {' | '.join(f'{loss:.4f}' for loss in losses.values())} | {best:g} |", flush=True)
    if args.figure:
        lines = {
            kind: {f"width {width}": (list(losses), list(losses.values())) for width, losses in widths.items()}
            for kind, widths in found.items()
        }
        draw(args.figure, lines, "learning rate", "held-out loss, nats per token", log=False)


def draw(
    path: Path, lines: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], x: str, y: str, log: bool
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (kind, curves) in zip(figure.subplots(1, 2, sharey=True), lines.items(), strict=True):
        for name, (widths, values) in curves.items():
            axes.plot(widths, values, "o-", label=name)
        axes.set(title=kind, xlabel=x, xscale="log", yscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        axes.set_ylabel(y)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["coordinates", "rates"])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--config", default="scaling", help="run configuration, as of `minillama scaling sweep`")
    parser.add_argument("--seeds", type=int, default=3, help="coordinates: initializations")
    parser.add_argument("--rate", type=float, default=2e-3, help="coordinates: learning rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2])
    parser.add_argument("--steps", type=int, default=0, help="4 for coordinates, 100 for rates")
    parser.add_argument("--rows", type=int, default=16, help="rates: sequences per step")
    parser.add_argument("--out", type=Path, default=Path("runs/mup"))
    parser.add_argument("--figure", type=Path, help="draw it here; needs matplotlib")
    args = parser.parse_args()
    base = load_run_config(args.config)
    args.steps = args.steps or (4 if args.what == "coordinates" else 100)
    {"coordinates": coordinates, "rates": rates}[args.what](args, base)


if __name__ == "__main__":
    adapt()
    main()
