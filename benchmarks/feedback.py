"""Learning from rewards on tasks whose answer is known: a bandit, sorting, addition, stories.

    python benchmarks/feedback.py bandit [--seeds 3] [--steps 600] [--rows 512]
    python benchmarks/feedback.py sorting [--seeds 3] [--sft 200] [--steps 200]
    python benchmarks/feedback.py addition [--seeds 3] [--seconds 600]
    python benchmarks/feedback.py stories MODEL TOKENIZER
    pip install --no-deps --target FOLDER trl==1.12.0 && python benchmarks/feedback.py speed --ppo-peer FOLDER

bandit: a closed-form optimum for every objective and KL estimator, which the policy's exact probabilities are held
against. sorting: five digits, fine-tuning and then GRPO and PPO by an exact checker, and random rewards as a control.
addition: two-digit sums by GRPO from a model that gets some right, and by fine-tuning for the same seconds.
stories: stories260K (llama2.c's checkpoint and tokenizer) learns to write happy words; a reward without a bound is
hacked and raises the alarms, one with a bound works. Held-out questions throughout. speed: beside TRL.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import feedback_speed as speed
import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.convert import convert
from minillama.data.prompts import Prompt, Prompts
from minillama.data.sources import Source
from minillama.evaluate.rewards import Scored, pass_at_k
from minillama.evaluate.rules import Answer, distinct
from minillama.inference.rollout import answers
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.runs.config import load_run_config
from minillama.runs.feedback import FeedbackConfig, GRPOConfig, PPOConfig
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.template import load_template
from minillama.tokenizer.train import byte_tokenizer
from minillama.training.gradients import accumulate, clip
from minillama.training.objectives.grpo import GRPO
from minillama.training.objectives.ppo import PPO
from minillama.training.run import train

# the bandit: one question, four answers of one token
REFERENCE, EARNED, BETA = (0.4, 0.3, 0.2, 0.1), (0.0, 0.5, 1.0, 1.5), 0.5
QUESTION = [40, 41]


class Arms:
    """Reward of an arm; -1 for what is none."""

    models, tokenizer = {}, byte_tokenizer()

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        found = torch.tensor([(*EARNED, -1.0)[min(answer.ids[0], 4)] for answer in answers])
        return Scored(found, {"arm": found})


def reverse_kl() -> list[float]:
    """P = q e^(r / beta) / Z, which maximizes the reward minus beta KL(p || q)."""
    weights = [q * math.exp(r / BETA) for q, r in zip(REFERENCE, EARNED, strict=True)]
    return [weight / sum(weights) for weight in weights]


def forward_kl(scale: float = 1.0) -> list[float]:
    """P = beta q / (beta - s (r - mean r)), where the gradient of s times the reward is that of beta KL(q || p)."""
    low, high = -10.0, 10.0
    for _ in range(200):  # the mean reward by bisection
        mean = (low + high) / 2
        found = [BETA * q / max(1e-9, BETA - scale * (r - mean)) for q, r in zip(REFERENCE, EARNED, strict=True)]
        low, high = (mean, high) if sum(found) > 1 else (low, mean)
    return found


def tempered() -> list[float]:
    """As `reverse_kl` where the group's own mean weakens the reward by 7/8."""
    weights = [q * math.exp(0.875 * r / BETA) for q, r in zip(REFERENCE, EARNED, strict=True)]
    return [weight / sum(weights) for weight in weights]


def group(**given: object) -> GRPOConfig:
    return GRPOConfig(rewards=(), max_new_tokens=1, beta=BETA, **given)  # type: ignore[arg-type]


# name -> settings, the optimum, and how near it the policy comes
BANDITS: dict[str, tuple[FeedbackConfig, Sequence[float], float]] = {
    "RLOO, k1 in the reward": (group(baseline="leave-one-out", kl="k1"), reverse_kl(), 0.01),
    "group mean, k1 in the reward": (group(baseline="mean", kl="k1"), reverse_kl(), 0.01),
    "PPO, k1 in the reward": (
        PPOConfig(rewards=(), max_new_tokens=1, samples=8, minibatches=2, epochs=2, beta=BETA, value_clip=1.0),
        reverse_kl(),
        0.01,
    ),
    "RLOO, k2 in the loss": (group(baseline="leave-one-out", kl="k2"), reverse_kl(), 0.01),
    "RLOO, k3 in the loss": (group(baseline="leave-one-out", kl="k3"), forward_kl(), 0.01),
    "group mean, k2 in the loss": (group(baseline="mean", kl="k2"), tempered(), 0.01),
    "group mean, k3 in the loss": (group(baseline="mean", kl="k3"), forward_kl(0.875), 0.01),
    "GRPO (std), k3 in the loss": (group(baseline="std", kl="k3"), (0.087, 0.078, 0.076, 0.759), 0.02),
    "RLOO, no KL": (group(baseline="leave-one-out"), (0.0, 0.0, 0.0, 1.0), 0.02),
}


def bandit_start(seed: int) -> Decoder:
    """A model that answers as the reference does."""
    shape = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=192, vocab_size=257, max_seq_len=16)
    model = Decoder(shape)
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        loss = -(torch.tensor(REFERENCE) * model(torch.tensor([QUESTION]))[0, -1].log_softmax(-1)[:4]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def arms(model: Decoder) -> Tensor:
    """Exact probabilities of the four answers."""
    return model(torch.tensor([QUESTION]))[0, -1].softmax(-1)[:4]


def bandit(settings: FeedbackConfig, seed: int, steps: int, rows: int, rate: float = 1e-3) -> Tensor:
    """Probabilities of the answers after training by an objective."""
    question = Prompt(QUESTION, "?", {}, Conversation(()), "bandit")
    data, model = Prompts([question], [question], 256, ""), bandit_start(seed)
    kind = PPO if isinstance(settings, PPOConfig) else GRPO
    objective = kind(model, data, seed, rows, settings, Arms(), rows)  # type: ignore[arg-type]
    parameters = [parameter for part in objective.models.values() for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        objective.prepare(step)
        accumulate(objective, objective.batch(step), rows, model.device)
        clip(objective.models, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return arms(model)


def run_bandit(args: argparse.Namespace) -> None:
    for name, (settings, wanted, bound) in BANDITS.items():
        if args.only not in name:
            continue
        began, found = time.process_time(), []
        for seed in range(args.seeds):
            found.append(bandit(settings, seed, args.steps * settings.epochs, args.rows, args.rate))
        off = max(
            max(abs(p - w) for p, w in zip(each.tolist(), wanted or each.tolist(), strict=True)) for each in found
        )
        shown = " | ".join(" ".join(f"{p:.3f}" for p in each.tolist()) for each in found)
        text = " ".join(f"{p:.3f}" for p in wanted)
        verdict = "ok" if off <= bound else "OFF"
        seconds = (time.process_time() - began) / args.seeds
        print(f"{name:30} {shown}; optimum {text}; off by {off:.4f}, {verdict}; {seconds:.0f} s a run", flush=True)


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
    "grpo": ("--objective.name", "grpo", "--objective.baseline", "mean", "--objective.samples", "8"),
    "ppo": ("--objective.name", "ppo", "--objective.samples", "4", "--objective.kl", "none", "--objective.epochs", "2"),
}


def learn(out: Path, config: str, start: Path, name: str, *words: str) -> tuple[list[dict[str, Any]], Quiet]:
    """A run of GRPO or PPO from the model of another run, on its data."""
    more = ("--data.template", "auto", "--objective.max_new_tokens", "6", "--train.context", "16")
    return run(out, config, *LEARN[name], *more, "--train.init_from", str(start / "model"), *words)


def sorting(folder: Path, seed: int, sft: int, steps: int, objectives: Sequence[str]) -> dict[str, dict[str, float]]:
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
        learn(folder / "learned", str(config), start, kind, *more, *reward)
        found[name] = examine(folder / "learned/model", "sorting")
    return found


def run_sorting(args: argparse.Namespace) -> None:
    for seed in range(1, args.seeds + 1):
        with tempfile.TemporaryDirectory() as place:
            began = time.perf_counter()
            for name, found in sorting(Path(place), seed, args.sft, args.steps, args.objectives).items():
                print(f"seed {seed}, {name:13} {shown(found)}", flush=True)
            print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)


# addition

WAYS = ("grpo", "fine-tuning")


def addition(folder: Path, seed: int, seconds: float, way: str, start: Path) -> tuple[dict[str, float], float]:
    """Shares of right sums after as many seconds of an objective, by steps whose time is measured first."""
    words = ["--seed", str(seed), "--train.init_from", str(start / "model"), "--checkpoint.every", "100000"]
    words += ["--validate.every", "100000"]
    config = "arithmetic" if way == "fine-tuning" else way
    trial, _ = run(folder / "trial", config, *words, "--train.steps", "12")
    steps = [line["seconds"] for line in trial if "lr" in line]
    each = (steps[-1] - steps[3]) / (len(steps) - 4)
    count = max(12, int(seconds / each))
    lines, _ = run(folder / way, config, *words, "--train.steps", str(count))
    return examine(folder / way / "model", "arithmetic"), lines[-1]["seconds"]


def run_addition(args: argparse.Namespace) -> None:
    for seed in range(1, args.seeds + 1):
        with tempfile.TemporaryDirectory() as place:
            start = Path(place) / "start"
            lines, _ = run(start, "arithmetic", "--seed", str(seed))
            found = examine(start / "model", "arithmetic")
            print(f"seed {seed}, start: {shown(found)}, {lines[-1]['seconds']:.0f} s", flush=True)
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
    one.set_defaults(run=run_bandit)
    two = commands.add_parser("sorting")
    two.add_argument("--sft", type=int, default=200, help="steps of fine-tuning")
    two.add_argument("--steps", type=int, default=200)
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
    five.set_defaults(run=speed.compare)
    for command in (one, two, three, four):
        command.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
