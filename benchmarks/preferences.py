"""Learning from preferences where the truth is known: a reward model at the Bayes limit, DPO on digits.

    python benchmarks/preferences.py reward-limit [--seeds 3] [--pairs 4000] [--epochs 3]
    python benchmarks/preferences.py digits-dpo [--seeds 3] [--steps 150]

`reward-limit` draws labels from a known utility, so that no model can be right more often than the utility itself.
`digits-dpo` prefers sorted over reversed digits and then samples: implicit accuracy alone proves nothing. Each has its
control: labels without meaning, and DPO without the loss of the chosen answers.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from minillama.config import ModelConfig
from minillama.data.preference_set import Judged, Preferences, collate
from minillama.model import Decoder
from minillama.model.heads import last, scores, with_score
from minillama.runs.objectives import DPOConfig
from minillama.training.gradients import accumulate, clip
from minillama.training.objectives.base import Objective
from minillama.training.objectives.dpo import DPO
from minillama.training.objectives.reward import RewardModel

BOS, END, THEN, TOKENS, LENGTH = 0, 1, 2, 16, 12  # ids; the tokens of a text and how many it has
DIGITS = 5


def decoder(vocabulary: int, seed: int) -> Decoder:
    shape = ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=192, vocab_size=vocabulary, max_seq_len=32
    )
    model = Decoder(shape)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def optimize(objective: Objective, steps: int, rate: float, after: Callable[[int], None] = lambda step: None) -> None:
    """AdamW with a rate that falls to 0."""
    (model,) = objective.models.values()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        objective.prepare(step)
        batch = objective.batch(step)
        loss = accumulate(objective, batch, len(batch.tokens), torch.device("cpu")).loss
        clip(objective.models, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 and isinstance(objective, DPO):
            print(f"  first loss {loss:.7f}", flush=True)
        after(step)


def compared(count: int, weights: np.ndarray, rng: np.random.Generator, is_control: bool) -> list[Judged]:
    """Pairs whose first answer won by Bradley and Terry's model: its utility is half the sum of its tokens' weights."""
    made = []
    for number in range(count):
        texts = rng.integers(TOKENS, size=(2, LENGTH))
        utility = weights[texts].sum(1) / 2
        is_first = rng.random() < (0.5 if is_control else 1 / (1 + math.exp(utility[1] - utility[0])))
        ids = [[*(text + 2).tolist(), END] for text in (texts if is_first else texts[::-1])]
        made.append(Judged.of([BOS], ids, 0.0, f"pair {number}"))
    return made


def reward_limit(seed: int, pairs: int, epochs: int, is_control: bool = False) -> dict[str, float]:
    """Held-out accuracy beside that of the utility itself, and how the learned difference follows the true one."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=TOKENS)
    train, held_out = compared(pairs, weights, rng, is_control), compared(2000, weights, rng, is_control)
    data = Preferences.of(train, held_out, 32)
    objective = RewardModel(with_score(decoder(TOKENS + 2, seed), torch.Generator().manual_seed(seed)), data, seed, 64)
    optimize(objective, epochs * pairs // 64, 1e-3)
    texts = collate(held_out)
    with torch.no_grad():
        ids, lengths = (torch.from_numpy(part).flatten(0, 1) for part in (texts.ids, texts.lengths))
        rewards = last(scores(objective.model, ids), lengths).view(-1, 2).double()
    words = torch.from_numpy(np.stack([[answer[:-1] for answer in row.answers] for row in held_out]).astype(int)) - 2
    utility = torch.from_numpy(weights)[words].sum(-1) / 2
    learned, true = rewards[:, 0] - rewards[:, 1], utility[:, 0] - utility[:, 1]
    covariance = torch.cov(torch.stack([true, learned]))
    return {
        "accuracy": (learned > 0).double().mean().item(),
        "limit": (true > 0).double().mean().item(),
        "order": (learned.sign() == true.sign()).double().mean().item(),
        "correlation": (covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()).item(),
        "slope": (covariance[0, 1] / covariance[0, 0]).item(),
    }


def questions(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, size=(count, DIGITS))


def texts_of(digits: np.ndarray) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts, and the sorted and the reversed answer of each."""
    prompts = [[BOS, *(row + 3).tolist(), THEN] for row in digits]
    rows = [np.sort(row) + 3 for row in digits]
    return prompts, [[[*row.tolist(), END], [*row[::-1].tolist(), END]] for row in rows]


def fine_tuned(seed: int, steps: int = 500, rows: int = 64) -> Decoder:
    """A model that answers half of the questions sorted, and half reversed."""
    model = decoder(13, seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        prompts, answers = texts_of(questions(rows, 1000 * seed + step))
        ids = torch.tensor(
            [prompt + pair[i % 2] for i, (prompt, pair) in enumerate(zip(prompts, answers, strict=True))]
        )
        start = DIGITS + 1
        model.loss(model.hidden(ids[:, :-1])[:, start:], ids[:, start + 1 :]).div(rows * (DIGITS + 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def sampled(model: Decoder, digits: np.ndarray, seed: int) -> tuple[float, float]:
    """Shares of sorted and of reversed answers among samples at temperature 1."""
    prompts, answers = texts_of(digits)
    ids, generator = torch.tensor(prompts), torch.Generator().manual_seed(seed)
    for _ in range(DIGITS + 1):
        chances = model(ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    wanted = torch.tensor(answers)
    same = (ids[:, None, -DIGITS - 1 :] == wanted).all(-1).double().mean(0)
    return same[0].item(), same[1].item()


def digits_dpo(start: Decoder, seed: int, steps: int, settings: DPOConfig) -> Mapping[str, float]:
    """Measures of DPO for sorted over reversed digits, from a fine-tuned model, which is left as it was."""
    model = Decoder(start.config)
    model.load_state_dict(start.state_dict())

    def pairs(count: int, seed: int) -> list[Judged]:
        return [Judged.of(prompt, pair, 0.0) for prompt, pair in zip(*texts_of(questions(count, seed)), strict=True)]

    data = Preferences.of(pairs(32 * steps, 77 + seed), pairs(500, 10**6 + seed), 32)
    objective = DPO(model, data, seed, 32, 32, settings)
    optimize(objective, steps, 1e-4)
    found, (ordered, reverse) = objective.validate(250, 0), sampled(model, questions(2000, 2 * 10**6 + seed), seed)
    warned = float(bool(objective.warnings(found)))
    return {**found, "sorted": ordered, "reversed": reverse, "warned": warned}


def run_reward(args: argparse.Namespace) -> None:
    for is_control in (False, True):
        print("labels without meaning" if is_control else "labels by utility", flush=True)
        for seed in range(args.seeds):
            began = time.process_time()
            found = reward_limit(seed, args.pairs, args.epochs, is_control)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"  seed {seed}: {shown}; {time.process_time() - began:.0f} s", flush=True)


def run_digits(args: argparse.Namespace) -> None:
    kinds = {"beta 0.1": DPOConfig(), "beta 0.5": DPOConfig(beta=0.5), "beta 0.1 + 1.0 x SFT": DPOConfig(sft=1.0)}
    for seed in range(args.seeds):
        began = time.process_time()
        start = fine_tuned(seed)
        ordered, reverse = sampled(start, questions(2000, 2 * 10**6 + seed), seed)
        print(f"seed {seed}: sampled sorted {ordered:.3f}, reversed {reverse:.3f} before", flush=True)
        for name, settings in kinds.items():
            found = digits_dpo(start, seed, args.steps, settings)
            shown = f"implicit accuracy {found['val_accuracy']:.3f}, sampled sorted {found['sorted']:.3f}, "
            shown += f"reversed {found['reversed']:.3f}, chosen log-ratio {found['val_chosen_log_ratio']:.2f} nats"
            print(f"  {name}: {shown}{', warned' * bool(found['warned'])}", flush=True)
        print(f"  {time.process_time() - began:.0f} s", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("reward-limit")
    one.add_argument("--seeds", type=int, default=3)
    one.add_argument("--pairs", type=int, default=4000)
    one.add_argument("--epochs", type=int, default=3)
    one.set_defaults(run=run_reward)
    two = commands.add_parser("digits-dpo")
    two.add_argument("--seeds", type=int, default=3)
    two.add_argument("--steps", type=int, default=150)
    two.set_defaults(run=run_digits)
    args = parser.parse_args(words)
    args.run(args)


if __name__ == "__main__":
    main()
