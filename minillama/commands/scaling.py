"""Scaling laws: fit them to finished runs, plan a run, sweep tiny runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from minillama.config import ModelConfig
from minillama.config.cost import training_days, training_memory
from minillama.config.loader import check
from minillama.errors import InputError

if TYPE_CHECKING:
    from minillama.scaling import fit, planning
    from minillama.scaling.points import Table

APPROACHES = (1, 2, 3)
AHEAD = (1, 4, 10, 100)  # times the largest budget
SHOWN = 60  # runs in the printed table
FEWEST = 20  # resamples for an interval of 95 %


@dataclass(frozen=True)
class Fit:
    """Fit scaling laws to finished runs by the three approaches of Hoffmann et al. 2022."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FILE.csv")]
    """Run folders, folders of run folders, or one CSV file with loss and two of params, tokens, flops."""
    approach: Literal["1", "2", "3", "all"] = "all"
    """1: envelope; 2: IsoFLOP parabolas; 3: parametric loss."""
    loss: Literal["nats", "bits"] = "nats"
    """nats per token, or bits per byte, which compare between tokenizers."""
    budgets: tuple[float, ...] = field(default=(), metadata={"above": 0})
    """FLOP budgets of approach 2, each with the runs within 15 %; found from the runs unless given."""
    window: float = field(default=1e9, metadata={"above": 1})
    """Approach 2: only sizes within this factor of a budget's best one."""
    drop: int = field(default=0, metadata={"min": 0})
    """Leave out the runs whose loss is not below the K-th highest; Epoch's rule has 5."""
    bootstrap: int = field(default=200, metadata={"min": 0})
    """Resamples for the intervals, 20 or more; 0: none."""
    seed: int = field(default=0, metadata={"min": 0})
    """Random seed of the bootstrap."""
    figure: Path | None = None
    """Figure to write (.png, .svg, .pdf)."""
    output: Path | None = None
    """TOML file to write the parametric law to, for `plan --constants`."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""

    def run(self) -> int:
        """Fit and print."""
        self.report()
        return 0

    def report(self) -> dict[int, fit.Fit]:
        """The fits by approach, printed and written."""
        from minillama.scaling.figure import check_figure, draw

        check(self)
        if 0 < self.bootstrap < FEWEST:
            expected = f"0, or {FEWEST} or more"
            raise InputError(
                "too few resamples for intervals", where="--bootstrap", found=self.bootstrap, expected=expected
            )
        if self.figure is not None:
            check_figure(self.figure)
        table = self.table().without_highest(self.drop)
        if not self.json:
            _show_table(table)
        fits, failures = self.fits(table)
        if not fits:
            reasons = "; ".join(
                f"approach {approach}: {error.what}, {error.found}" for approach, error in failures.items()
            )
            raise InputError("these runs cannot be fitted", found=reasons, fix="add sizes and budgets")
        if self.output is not None:
            _write_law(self.output, fits)
        if self.figure is not None:
            draw(self.figure, table, fits, self.budgets)
        if self.json:
            failed = {approach: str(error) for approach, error in failures.items()}
            found = {approach: asdict(one) for approach, one in fits.items()}
            print(json.dumps({"table": asdict(table), "fits": found, "failed": failed}))
            return fits
        _show_fits(table, fits, failures)
        if all(point.counts for point in table.points):
            self._show_counts(table)
        return fits

    def table(self) -> Table:
        """Runs of the command line."""
        from minillama.scaling.points import read_csv, read_runs

        files = [path for path in self.paths if path.is_file() or path.suffix == ".csv"]
        if not self.paths or (files and len(self.paths) > 1):
            expected, found = "run folders, or one CSV file", ", ".join(map(str, self.paths)) or "nothing"
            raise InputError("nothing to fit together", where="command line", found=found, expected=expected)
        return read_csv(files[0], self.loss) if files else read_runs(self.paths, self.loss)

    def fits(self, table: Table) -> tuple[dict[int, fit.Fit], dict[int, InputError]]:
        """Fits by approach, and the reasons for those that are not possible."""
        from minillama.scaling.fit import fit

        found, failures = {}, {}
        for approach in APPROACHES if self.approach == "all" else (int(self.approach),):
            try:
                found[approach] = fit(table, approach, self.window, self.budgets, self.bootstrap, self.seed)
            except InputError as error:
                failures[approach] = error
        return found, failures

    def _show_counts(self, table: Table) -> None:
        """Exponents under the three counts of N."""
        from minillama.scaling.points import COUNTS

        print("\nexponent a of N_opt by the count of N")
        for count, name in COUNTS.items():
            fits, _ = replace(self, bootstrap=0).fits(table.counted(count))
            found = [f"{one.params.exponent:.3f} (approach {approach})" for approach, one in fits.items()]
            print(f"  {name:34} {', '.join(found) or 'no fit'}")


@dataclass(frozen=True)
class Plan:
    """Plan a run from one of --flops, --params, --tokens, --days: N, D, shape, learning rate, batch, loss, days."""

    flops: float = field(default=0, metadata={"min": 0})
    """Training FLOPs, C."""
    params: float = field(default=0, metadata={"min": 0})
    """Parameters without the embedding, N."""
    tokens: float = field(default=0, metadata={"min": 0})
    """Training tokens, D."""
    days: float = field(default=0, metadata={"min": 0})
    """Days on --gpus at --mfu, for C."""
    gpus: int = field(default=1, metadata={"min": 1})
    """Number of devices."""
    mfu: float = field(default=0.4, metadata={"above": 0, "max": 1})
    """Model FLOPs utilization."""
    tflops: float = field(default=989.0, metadata={"above": 0})
    """Peak TFLOP/s per device; 989 is an H100's in bfloat16."""
    unique_tokens: float = field(default=0, metadata={"min": 0})
    """Unique training tokens there are, U; 0: as many as are needed."""
    inference_tokens: float = field(default=0, metadata={"min": 0})
    """Tokens of inference over the model's life, I: the cheapest model of the same loss in training and inference."""
    constants: str = "epoch"
    """Scaling law: chinchilla, epoch, muennighoff, or a TOML file of `fit --output`."""
    vocab_size: int = field(default=32000, metadata={"min": 1})
    """Vocabulary size of the model."""
    context: int = field(default=2048, metadata={"min": 1})
    """Tokens per sequence."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""

    def run(self) -> int:
        """Plan and print."""
        from minillama.scaling.laws import Law
        from minillama.scaling.planning import plan
        from minillama.scaling.points import counts

        check(self)
        given = [name for name in ("flops", "params", "tokens", "days") if getattr(self, name)]
        if len(given) != 1:
            expected = "one of --flops, --params, --tokens, --days"
            raise InputError("a plan starts from one number", found=", ".join(given) or "none", expected=expected)
        law, peak = Law.load(self.constants), self.tflops * 1e12
        found = plan(
            law,
            ModelConfig(vocab_size=self.vocab_size, max_seq_len=self.context),
            flops=self.flops or self.days * 86400 * self.gpus * peak * self.mfu,
            params=self.params,
            tokens=self.tokens,
            unique=self.unique_tokens,
            inference=self.inference_tokens,
        )
        days = training_days(found.shape, found.tokens, self.context, peak, self.gpus, self.mfu)
        memory = training_memory(found.shape, 1, self.context, activation_bytes=2, checkpointing=True).total
        if self.json:
            more = {"parameters": counts(found.shape), "days": days, "training_bytes": memory, "unit": law.unit}
            print(json.dumps(asdict(found) | more))
        else:
            self._show(found, law.unit, days, memory)
        return 0

    def _show(self, found: planning.Plan, unit: str, days: float, memory: int) -> None:
        shape, (params, tokens) = found.shape, found.optimum
        layers = f"{shape.n_layers} layers of width {shape.dim}, {shape.n_heads} heads of {shape.head_dim}"
        optimum = f"N {params:.4g}{_between(found.optimum_interval)}, D {tokens:.4g}, 6ND {6 * params * tokens:.4g}"
        share = 6 * found.params * found.tokens / found.flops
        rows = {
            f"optimum ({self.constants})": f"{optimum}, loss {found.optimum_loss:.4f}",
            "shape": f"{layers}, feed-forward width {shape.hidden_dim}",
            "parameters": f"{found.params:,} without the embedding, {shape.num_params():,} with it",
            "tokens": f"{found.tokens:.4g}, {found.tokens / found.params:.3g} per parameter",
            "FLOPs": f"{found.flops:.4g}, counted exactly; 6ND is {share:.1%} of them",
            "predicted loss": f"{found.loss:.4f} {unit}{_between(found.loss_interval)}",
            "learning rate": f"{found.learning_rate:.3g} = 0.3118 C^-0.125 (DeepSeek LLM)",
            "batch": f"{found.rows} x {self.context} tokens = 0.292 C^0.3271 (DeepSeek LLM), {found.steps:,} steps",
            "days": f"{days:.4g} on {self.gpus} x {self.tflops:g} TFLOP/s at an MFU of {self.mfu:.0%}",
            "memory": f"{memory / 2**30:,.4g} GiB in all: AdamW, one sequence in bfloat16 with checkpointing",
        }
        if self.unique_tokens:
            rows["epochs"] = f"{found.tokens / self.unique_tokens:.3g}"
        if self.inference_tokens:
            rows["inference"] = f"{found.saved:.1%} fewer FLOPs in all than with the optimum of training alone"
        for name, text in rows.items():
            print(f"{name:22}  {text}")
        for note in found.notes:
            print(f"note: {note}")
        if found.loss_interval is None:
            print(f"note: no intervals, as no resamples of {self.constants}'s constants are known")


@dataclass(frozen=True)
class Sweep:
    """Train a grid of tiny runs, several sizes at each budget; fit them; plan the next size. Goes on after a stop."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = "scaling"
    """Run configuration that all runs share: the name of a file in configs/train, or a path."""
    budgets: tuple[float, ...] = field(default=(1e12, 2e12, 4e12, 8e12), metadata={"above": 0})
    """FLOPs per run."""
    sizes: int = 5
    """Sizes per budget; more are added where the best one is at the edge."""
    minutes: float = field(default=0.0, metadata={"min": 0})
    """Start no run that would end after so many minutes; the same command goes on. 0: no limit."""
    out: Path = Path("runs/scaling")
    """Folder of all runs."""
    figure: Path | None = None
    """Figure to write (.png, .svg, .pdf)."""
    next: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train the planned run at four times the largest budget, too, and compare its loss with the prediction."""

    def run(self) -> int:
        """Train, fit, plan."""
        from minillama.runs.config import load_run_config
        from minillama.scaling import sweep
        from minillama.scaling.figure import check_figure
        from minillama.scaling.points import read_runs

        check(self)
        if self.figure is not None:
            check_figure(self.figure)
        grid = sweep.Sweep(load_run_config(self.config), self.out, self.budgets, self.sizes, self.minutes)
        if not grid.run():
            print("the same command goes on")
            return 1
        fits = Fit((self.out,), figure=self.figure).report()
        config, made = sweep.predict(grid, fits)
        _write_law(self.out / "law.toml", fits)
        size = f"{config.model.n_layers} layers of width {config.model.dim}, N {made['params']:,}"
        print(f"\nnext: {made['flops']:.4g} FLOPs, {size}, D {made['tokens']:.4g}")
        least = made.get("least_loss")  # not of earlier sweeps
        by_minima = f", by the budgets' minima {least:.4f}" if least else ""
        print(f"predicted loss {made['loss']:.4f}{_between(made['interval'])}{by_minima}")
        if not self.next:
            return 0
        path = self.out / "next" / "run"
        if not grid.finish(config, path):
            return 1
        measured = read_runs([path]).points[0].loss
        by_minima = f", by the budgets' minima {least / measured - 1:+.2%}" if least else ""
        print(f"measured loss {measured:.4f}: the prediction is off by {made['loss'] / measured - 1:+.2%}{by_minima}")
        return 0


Args = (
    Annotated[Fit, tyro.conf.subcommand("fit")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
)


def run(args: Fit | Plan | Sweep) -> int:
    """Run the subcommand."""
    return args.run()


def _write_law(path: Path, fits: dict[int, fit.Fit]) -> None:
    import tomli_w

    from minillama.config.loader import to_dict
    from minillama.files import replace_text

    if 3 not in fits:
        raise InputError("only approach 3 has a law to write", where="--output", found=f"approaches {list(fits)}")
    replace_text(path, tomli_w.dumps(to_dict(fits[3].law)))


def _show_table(table: Table) -> None:
    from minillama.scaling.laws import NATS

    for note in table.notes:
        print(f"note: {note}")
    if len(table.points) > SHOWN:
        print(f"{len(table.points)} runs")
        return
    print(f"{'run':28} {'N':>10} {'D':>10} {'D/N':>7} {'C':>10} {'nats':>8} {'bits/byte':>9}")
    for p in sorted(table.points, key=lambda point: (point.flops, point.params)):
        nats, bits = p.measures or ((p.loss, math.nan) if table.unit == NATS else (math.nan, p.loss))
        figures = f"{p.params:10.4g} {p.tokens:10.4g} {p.tokens / p.params:7.3g} {p.flops:10.4g}"
        print(f"{p.name[-28:]:28} {figures} {nats:8.4f} {bits:9.4f}")


def _show_fits(table: Table, fits: dict[int, fit.Fit], failures: dict[int, InputError]) -> None:
    from minillama.scaling.fit import NAMES
    from minillama.scaling.laws import CONSTANTS, interval

    for approach, one in fits.items():
        print(f"\napproach {approach}, {NAMES[approach]}")
        for name, letter, power in (("N_opt", "a", one.params), ("D_opt", "b", one.tokens), ("loss", "", one.loss)):
            if power is None:
                continue
            print(f"  {name} = {power.coefficient:.5g} C^{power.exponent:.4f}{_between(one.intervals.get(letter))}")
        if one.law is not None:
            for name in CONSTANTS:
                print(f"  {name} = {getattr(one.law, name):.6g}{_between(one.intervals.get(name))}")
            print(f"  ln(predicted / measured): mean {one.bias:+.5f}, root mean square {one.law.residual:.5f}")
        for note in one.notes:
            print(f"  note: {note}")
    for approach, error in failures.items():
        print(f"\napproach {approach}, {NAMES[approach]}: {error}")
    largest, law = max(table.column("flops")), fits[3].law if 3 in fits else None
    head = "".join(f"{f'N_opt ({a})':>12}" for a in fits) + "".join(f"{f'loss ({a})':>10}" for a in fits)
    print(f"\n{'C':>10} {'beyond':>7}{head}  {table.unit}")
    for factor in AHEAD:
        flops = factor * largest
        row = f"{flops:10.3g} {factor:6}x" + "".join(f"{one.params(flops):12.4g}" for one in fits.values())
        row += "".join(f"{one.loss(flops):10.4f}" for one in fits.values() if one.loss is not None)
        if law is not None:
            size = fits[3].params(flops), fits[3].tokens(flops)
            bounds = interval(law, lambda near, at=size: near.loss(*at), law.residual)  # type: ignore[misc]
            row += f"{law.loss(*size):10.4f}{_between(bounds)}"
        print(row)


def _between(bounds: Sequence[float] | None) -> str:
    return f" ({bounds[0]:.4g} to {bounds[1]:.4g})" if bounds else ""
