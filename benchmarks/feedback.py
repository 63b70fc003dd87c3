"""Learning from rewards on tasks whose answer is known: a bandit, sorting, addition, stories.

    python benchmarks/feedback.py bandit [--seeds 3] [--steps 600] [--rows 512]
    python benchmarks/feedback.py sorting [--seeds 3] [--sft 200] [--steps 400]
    python benchmarks/feedback.py addition [--seeds 3] [--seconds 600]
    python benchmarks/feedback.py stories MODEL TOKENIZER
    pip install --no-deps --target FOLDER trl==1.12.0 && python benchmarks/feedback.py speed --ppo-peer FOLDER

bandit: a closed-form optimum for every objective and KL estimator, which the policy's exact probabilities are held
against. sorting: five digits, fine-tuning and then GRPO and PPO by an exact checker, and random rewards as a control.
addition: two-digit sums by GRPO and PPO from a model that gets some right, and by fine-tuning for the same seconds.
stories: stories260K (llama2.c's checkpoint and tokenizer) learns to write happy words; a reward without a bound is
hacked and raises the alarms, one with a bound works. Held-out questions throughout. speed: beside TRL.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import feedback_bandit
import feedback_speed as speed
import torch

from minillama.convert import convert
from minillama.data.prompts import Prompts
from minillama.data.sources import Source
from minillama.evaluate.rewards import pass_at_k
from minillama.evaluate.rules import distinct
from minillama.inference.rollout import answers
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.runs.config import load_run_config
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.template import load_template
from minillama.training.run import train

# runs of `minillama train`


class Quiet:
    """Report of a run that keeps its messages; `warnings` are those that warn."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def start(self, step: int, steps: int) -> None:
        pass

    def step(self, record: Mapping[str, Any]) -> None:
        pass

    def say(self, text: str = "") -> None:
        self.warnings += [text] if text.startswith("warning") else []

    def stop(self) -> None:
        pass


def run(out: Path, config: str, *words: str) -> tuple[list[dict[str, Any]], Quiet]:
    """Lines of metrics of a run, and its report."""
    report = Quiet()
    train(load_run_config(config, [*words, "--train.compile", "false"]), str(out), overwrite=True, report=report)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()], report


def examine(folder: Path, source: str, samples: int = 8) -> dict[str, float]:
    """Shares of held-out questions that are answered right: greedily, by one sample, by one of several."""
    model, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    template = load_template("", tokenizer)
    prompts = Prompts.load([Source(source)], template, tokenizer, 64, 0.1).val[:500]
    right = []
    for count, sampling in ((1, Sampling(0.0)), (samples, Sampling(1.0))):
        ids, seeds = [p.ids for p in prompts], [1000 * i for i in range(len(prompts))]
        found = answers(model, ids, count, 16, sampling, tokenizer.stop_ids, seeds)
        texts = [tokenizer.decode(request.tokens) for request in found]
        wanted = [p.record["answer"] for p in prompts for _ in range(count)]
        right.append(torch.tensor([text == want for text, want in zip(texts, wanted, strict=True)]).view(-1, count))
    passed = [pass_at_k(samples, int(row.sum()), samples) for row in right[1]]
    return {
        "greedy": right[0].float().mean().item(),
        "pass@1": right[1].float().mean().item(),
        f"pass@{samples}": sum(passed) / len(passed),
    }


def shown(measures: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in measures.items())


def coin(prompt: str, ids: Sequence[int], text: str, record: Mapping[str, Any]) -> float:
    """Reward that knows nothing: the control."""
    return float(torch.rand(()) < 0.5)


SORTING = """
[model]
dim = 64
n_layers = 2
n_heads = 4
n_kv_heads = 2
hidden_dim = 192
vocab_size = 257
max_seq_len = 32
[tokenizer]
kind = "bytes"
[data]
sources = [{ name = "sorting" }]
template = "plain"
packing = "none"
val_fraction = 0.1
[train]
batch_size = 64
context = 12
dtype = "float32"
[optim]
lr = 3e-3
warmup_steps = 20
weight_decay = 0.0
[validate]
every = 100000
[sample]
max_new_tokens = 0
"""

LEARN = {
    "grpo": {"name": "grpo", "baseline": "mean", "samples": "8"},
    "ppo": {"name": "ppo", "critic": "shared", "kl": "none", "epochs": "1", "minibatches": "2", "temperature": "1.5"},
}


def learn(out: Path, config: str, start: Path, name: str, *words: str) -> tuple[list[dict[str, Any]], Quiet]:
    """A run of GRPO or PPO from the model of another run, on its data."""
    more = ("--data.template", "auto", "--objective.max_new_tokens", "6", "--train.context", "16")
    settings = [word for key, value in LEARN[name].items() for word in (f"--objective.{key}", value)]
    return run(out, config, *settings, *more, "--train.init_from", str(start / "model"), *words)


def sorting(
    folder: Path, seed: int, sft: int, steps: int, objectives: Sequence[str], oversample: int = 1
) -> dict[str, dict[str, float]]:
    """Shares of right answers after fine-tuning, after each objective, and after random rewards."""
    config = folder / "sorting.toml"
    config.write_text(SORTING, encoding="utf-8")
    start = folder / "start"
    run(start, str(config), "--seed", str(seed), "--train.steps", str(sft))
    found = {"fine-tuning": examine(start / "model", "sorting")}
    more = ("--seed", str(seed), "--train.steps", str(steps), "--train.batch_size", "256", "--optim.lr", "3e-4")
    for name in objectives:
        kind, control = name.removesuffix(" control"), name.endswith(" control")
        reward = ("--objective.rewards", f"{__file__}:coin") if control else ()
        drawn = ("--objective.oversample", str(oversample)) if kind == "grpo" else ()
        learn(folder / "learned", str(config), start, kind, *more, *reward, *drawn)
        found[name] = examine(folder / "learned/model", "sorting")
    return found


def run_sorting(args: argparse.Namespace) -> None:
    for seed in range(1, args.seeds + 1):
        with tempfile.TemporaryDirectory() as place:
            began = time.perf_counter()
            for name, found in sorting(
                Path(place), seed, args.sft, args.steps, args.objectives, args.oversample
            ).items():
                print(f"seed {seed}, {name:13} {shown(found)}", flush=True)
            print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)


# addition

WAYS = ("grpo", "ppo", "fine-tuning")


def addition(folder: Path, seed: int, seconds: float, way: str, start: Path) -> tuple[dict[str, float], float]:
    """Shares of right sums after as many processor seconds of an objective, by steps whose time is measured first."""
    words = ["--seed", str(seed), "--train.init_from", str(start / "model"), "--checkpoint.every", "100000"]
    words += ["--validate.every", "100000"]
    config = "arithmetic" if way == "fine-tuning" else way
    short, long = (_processor(folder / "trial", config, *words, "--train.steps", str(steps)) for steps in (12, 36))
    count = max(12, int(seconds * torch.get_num_threads() / (long - short) * 24))
    taken = _processor(folder / way, config, *words, "--train.steps", str(count)) / torch.get_num_threads()
    return examine(folder / way / "model", "arithmetic"), taken


def _processor(out: Path, config: str, *words: str) -> float:
    """Processor seconds of a run, of all threads: what other programs take is not counted."""
    began = time.process_time()
    run(out, config, *words)
    return time.process_time() - began


def beginner(out: Path, seed: int) -> tuple[dict[str, float], int]:
    """A model that answers 20 to 50% of held-out sums, greedily, and its steps, which depend on the seed."""
    low, high = 240, 480
    while True:
        steps = (low + high) // 2
        run(out, "arithmetic", "--seed", str(seed), "--train.steps", str(steps), "--validate.every", str(steps))
        found = examine(out / "model", "arithmetic")
        if 0.2 <= found["greedy"] <= 0.5 or high - low < 4:
            return found, steps
        low, high = (steps, high) if found["greedy"] < 0.2 else (low, steps)


def run_addition(args: argparse.Namespace) -> None:
    for seed in range(1, args.seeds + 1):
        with tempfile.TemporaryDirectory() as place:
            start = Path(place) / "start"
            found, steps = beginner(start, seed)
            print(f"seed {seed}, start: {shown(found)}, {steps} steps of fine-tuning", flush=True)
            for way in args.ways:
                found, taken = addition(Path(place), seed, args.seconds, way, start)
                print(f"seed {seed}, {way}: {shown(found)}, {taken:.0f} s", flush=True)


# stories

BEGINNINGS = (
    "Once upon a time there was a small dog",
    "One day a girl went to the park with",
    "Tom had a red ball. He",
    "The cat sat by the door and",
    "Lily and her mom went to the shop",
    "There was a big tree near the house",
    "Ben saw a bird in the garden",
    "In the morning the children",
    "A little fish lived in the lake",
    "Sue found a box under her bed",
)
HAPPY = ("happy", "smile", "smiled", "laugh", "laughed", "love", "loved", "fun", "play", "friend")
SAD = ("sad", "cry", "cried", "afraid", "scared", "angry", "hurt", "lost", "alone", "mean")


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def unbounded(prompt: str, ids: Sequence[int], text: str, record: Mapping[str, Any]) -> float:
    """Happy words minus sad ones, as often as they come."""
    return float(sum((word in HAPPY) - (word in SAD) for word in _words(text)))


def bounded(prompt: str, ids: Sequence[int], text: str, record: Mapping[str, Any]) -> float:
    """At most three different happy words, minus different sad ones."""
    found = set(_words(text))
    return float(min(3, len(found & set(HAPPY))) - len(found & set(SAD)))


STORIES = {"unbounded": ("0.05", "1e-3", 100), "bounded": ("0.1", "3e-4", 80)}


def stories(folder: Path, model: Path, tokenizer: Path, reward: str, seed: int, steps: int) -> dict[str, Any]:
    """Reward, KL and repetition before and after, on held-out beginnings, and the warnings."""
    start = folder / "start"
    convert(model, start, "hf", None, tokenizer)
    beta, rate, usual = STORIES[reward]
    steps = steps or usual
    file = folder / "beginnings.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in BEGINNINGS), encoding="utf-8")
    config = folder / "stories.toml"
    config.write_text("", encoding="utf-8")
    words = [
        *("--data.sources", str(file), "--data.template", "plain", "--data.val_fraction", "0.4"),
        *("--objective.name", "grpo", "--objective.baseline", "leave-one-out", "--objective.samples", "16"),
        *("--objective.max_new_tokens", "48", "--objective.kl", "k1", "--objective.beta", beta),
        *("--objective.rewards", f"{__file__}:{reward}", "--train.init_from", str(start), "--train.batch_size", "32"),
        *("--train.steps", str(steps), "--train.context", "96", "--optim.lr", rate, "--optim.warmup_steps", "5"),
        *("--optim.weight_decay", "0", "--validate.every", "20", "--seed", str(seed), "--train.dtype", "float32"),
    ]
    lines, report = run(folder / "run", str(config), *words)
    before, after = (held_out(Path(path), start, file, reward) for path in (start, folder / "run/model"))
    last = [line["kl"] for line in lines if "kl" in line][-5:]
    return {"before": before, "after": after, "kl": sum(last) / len(last), "warnings": report.warnings}


@torch.no_grad()
def held_out(folder: Path, start: Path, file: Path, reward: str, samples: int = 16) -> dict[str, float]:
    """Mean reward and distinct-2 of sampled stories on held-out beginnings, and their KL to the start model."""
    model, first, tokenizer = Decoder.from_pretrained(folder), Decoder.from_pretrained(start), Tokenizer.load(start)
    prompts = Prompts.load([Source(path=str(file))], load_template("plain", tokenizer), tokenizer, 48, 0.4).val
    seeds = [1000 * i for i in range(len(prompts))]
    found = answers(model, [p.ids for p in prompts], samples, 48, Sampling(1.0), tokenizer.stop_ids, seeds)
    kl = 0.0
    for number, request in enumerate(found):
        prompt = prompts[number // samples].ids
        ids = torch.tensor([*prompt, *request.tokens])
        p, q = (m(ids[None, :-1])[0, len(prompt) - 1 :].log_softmax(-1) for m in (model, first))
        kl += (p - q).gather(1, ids[len(prompt) :, None]).sum().item()
    earned = [globals()[reward]("", request.tokens, tokenizer.decode(request.tokens), {}) for request in found]
    return {
        "reward": sum(earned) / len(found),
        "distinct-2": sum(distinct(request.tokens) for request in found) / len(found),
        "kl": kl / len(found),
    }


def run_stories(args: argparse.Namespace) -> None:
    for reward in args.rewards:
        for seed in range(1, args.seeds + 1):
            with tempfile.TemporaryDirectory() as place:
                began = time.perf_counter()
                found = stories(Path(place), args.model, args.tokenizer, reward, seed, args.steps)
            print(f"{reward}, seed {seed}, {time.perf_counter() - began:.0f} s", flush=True)
            print(f"  before: {shown(found['before'])}\n  after: {shown(found['after'])}", flush=True)
            print("".join(f"  {line}\n" for line in sorted(set(found["warnings"]))), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("bandit")
    one.add_argument("--steps", type=int, default=600)
    one.add_argument("--rows", type=int, default=512, help="answers per step")
    one.add_argument("--rate", type=float, default=1e-3)
    one.add_argument("--only", default="", help="part of an objective's name")
    one.set_defaults(run=feedback_bandit.compare)
    two = commands.add_parser("sorting")
    two.add_argument("--sft", type=int, default=150, help="steps of fine-tuning")
    two.add_argument("--steps", type=int, default=400)
    two.add_argument("--oversample", type=int, default=1, help="of GRPO; PPO has one answer to a prompt")
    two.add_argument("--objectives", nargs="+", default=["grpo", "ppo", "grpo control"])
    two.set_defaults(run=run_sorting)
    three = commands.add_parser("addition")
    three.add_argument("--seconds", type=float, default=600)
    three.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    three.set_defaults(run=run_addition)
    four = commands.add_parser("stories")
    four.add_argument("model", type=Path, help="llama2.c's checkpoint of stories260K")
    four.add_argument("tokenizer", type=Path, help="its tok512.bin")
    four.add_argument("--steps", type=int, default=0)
    four.add_argument("--rewards", nargs="+", default=list(STORIES), choices=list(STORIES))
    four.set_defaults(run=run_stories)
    five = commands.add_parser("speed")
    five.add_argument("--ppo-peer", default="", help="folder with TRL 1.12, the last with PPO")
    five.add_argument("--contenders", nargs="+", default=speed.CONTENDERS, choices=speed.CONTENDERS)
    five.add_argument("--steps", type=int, default=8)
    five.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="TRL's autocast to it")
    five.add_argument("--model", default="", help="folder of a model instead of a random LLaMA, dim 256, 4 layers")
    five.set_defaults(run=speed.compare)
    for command in (one, two, three, four):
        command.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
