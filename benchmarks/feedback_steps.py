"""The three steps of RLHF end to end: a fine-tuned model, a reward model of it, and PPO by that reward; DPO beside it.

    python benchmarks/feedback_steps.py --model runs/sft/model --source python-qa
    python benchmarks/feedback_steps.py --model SMOLLM2 --source dpo_en_demo.json --lora --steps 40 --rows 8

Held-out accuracy of reward model and DPO before and after, with Wilson's 95% interval, beside the longer answer; of DPO
before: the share of pairs whose chosen answer the start model finds the more probable one, in all and per token;
held-out reward before and after PPO, and the KL of its rollouts. Folders and metrics stay in --out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from feedback import run

from minillama.data import preference_set
from minillama.data.preference_set import Judged
from minillama.data.sources import Source
from minillama.inference.load import ModelArgs
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.template import load_template
from minillama.training.objectives.answers import answer_log_probabilities
from minillama.training.objectives.compared import batch_of


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share, 95% (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""
    z = 1.96
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - half) / scale, (middle + half) / scale


def ends(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """First and last value of a measure."""
    found = [line[name] for line in lines if line.get(name) is not None]
    return found[0], found[-1]


def held_out(folder: Path, args: argparse.Namespace) -> list[Judged]:
    """Held-out pairs."""
    tokenizer = Tokenizer.load(folder)
    template = load_template(args.template if args.template != "auto" else "", tokenizer)
    return list(preference_set.load([Source(args.source)], template, tokenizer, args.context, args.held_out).val)


def likelier(model: str, pairs: Sequence[Judged], context: int) -> tuple[float, float]:
    """Share of pairs whose chosen answer has the higher log-probability, in all and per token; ties count a half.

    DPO's own margin is 0 at the start, and its accuracy there 0.5 whatever the model knows.
    """
    decoder, _ = ModelArgs(model, dtype="float32").load()
    right = [0.0, 0.0]
    for pair in pairs:
        batch = batch_of([pair], context)
        tokens, targets, answers = (part[0] for part in (batch.tokens, batch.targets, batch.extras["answers"]))
        with torch.no_grad():
            sums = answer_log_probabilities(decoder, tokens, targets, answers)[0].sum(-1)
        for i, values in enumerate((sums, sums / batch.extras["counts"][0])):
            right[i] += 0.5 * (1 + (values[0] - values[1]).sign().item())
    return right[0] / len(pairs), right[1] / len(pairs)


def steps(args: argparse.Namespace) -> None:
    adapter = ("--lora.rank", "8", "--optim.muon_lr", "0") if args.lora else ()
    shared = ["--data.sources", args.source, "--data.template", args.template, "--train.init_from", args.model]
    shared += [
        "--data.val_fraction",
        str(args.held_out),
        "--train.context",
        str(args.context),
        "--validate.tokens",
        "0",
    ]
    shared += ["--train.steps", str(args.steps), "--validate.every", str(args.steps), "--sample.max_new_tokens", "0"]
    shared += ["--checkpoint.every", "100000", "--train.batch_size", str(args.rows), *adapter]
    rates = {"reward": "2e-4", "dpo": "5e-5"}
    for name, rate in rates.items():
        if name not in args.methods:
            continue
        began = time.perf_counter()
        lines, _ = run(args.out / name, name, *shared, "--optim.lr", rate)
        pairs = held_out(args.out / name / "model", args)
        count, (before, after) = len(pairs), ends(lines, "val_accuracy")
        of = ""
        if name == "dpo":
            before, mean = likelier(args.model, pairs, args.context)
            of = f" (the start model's more probable answer; per token {mean:.3f})"
        low, high = interval(after, count)
        print(
            f"{name}: held-out accuracy {before:.3f}{of} -> {after:.3f} [{low:.3f}, {high:.3f}] of {count} pairs, "
            f"longer answer {ends(lines, 'val_longer_wins')[1]:.3f}; {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    if "ppo" not in args.methods:
        return
    reward, began = str(args.out / "reward/model"), time.perf_counter()
    more = ("--objective.rewards", reward, "--objective.max_new_tokens", str(args.new_tokens), "--optim.lr", args.rate)
    more += ("--train.steps", str(args.ppo_steps), "--validate.every", str(args.ppo_steps), "--objective.kl", "k1")
    critic = ("--objective.critic", "shared")
    if not args.lora:
        critic = ("--objective.critic", "own", "--objective.critic_from", reward)
    target = ("--objective.kl_target", str(args.kl_target), "--objective.beta", "0.05", "--objective.kl_horizon", "200")
    lines, report = run(args.out / "ppo", "ppo", *shared, *more, *critic, *target, "--validate.tokens", "4000")
    before, after = ends(lines, "val_reward")
    kl = ends(lines, "kl")[1]
    print(
        f"ppo: held-out reward {before:.3f} -> {after:.3f}, KL {kl:.2f} nats per answer, target {args.kl_target:g}; "
        f"{time.perf_counter() - began:.0f} s",
        *sorted(set(report.warnings)),
        sep="\n  ",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="fine-tuned model")
    parser.add_argument("--source", default="python-qa", help="preferences")
    parser.add_argument("--template", default="auto", help="chat template")
    parser.add_argument("--lora", action="store_true", help="train adapters; PPO then shares the policy's backbone")
    parser.add_argument("--out", type=Path, default=Path("runs/feedback-steps"))
    parser.add_argument("--methods", nargs="+", default=["reward", "dpo", "ppo"], choices=["reward", "dpo", "ppo"])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    parser.add_argument("--rows", type=int, default=16, help="pairs, or answers, per step")
    parser.add_argument("--context", type=int, default=255, help="a reward model reads one token more")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the pairs")
    parser.add_argument("--ppo-steps", type=int, default=200, help="optimizer steps of PPO")
    parser.add_argument("--rate", default="1e-4", help="learning rate of PPO")
    parser.add_argument("--kl-target", type=float, default=6.0, help="nats per answer")
    steps(parser.parse_args())


if __name__ == "__main__":
    main()
