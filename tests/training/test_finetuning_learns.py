"""Fine-tuning learns to answer held-out questions and to stop, over seeds: all weights, and an adapter."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.inference.chat import ChatPrompts
from minillama.inference.generate import generate
from minillama.inference.load import ModelArgs
from minillama.inference.sampling import Sampling
from minillama.runs.config import RunConfig
from minillama.training.run import train

from .test_trainer import Quiet

NUMBERS = (
    "nought one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
HELD_OUT = 200


def questions() -> list[tuple[str, str]]:
    """Questions and answers, 648 in a random order."""
    asks, names = ("What do {} and {} make?", "Add {} and {}."), NUMBERS.split()
    found = [(ask.format(a, b), f"Together {a} and {b}, no less.") for ask in asks for a in names for b in names]
    return random.Random(1).sample(found, len(found))


def ends(folder: Path, adapter: tuple[str, ...] = ()) -> float:
    """Share of the greedy answers to 200 held-out questions that end by themselves."""
    model, tokenizer = ModelArgs(str(folder), adapter=adapter).load(compiles=True)
    prompts = ChatPrompts(tokenizer, "vicuna")
    model.stop_ids |= prompts.stop_ids
    ids = [prompts(question) for question, _ in questions()[:HELD_OUT]]
    given = generate(model, tokenizer, ids, 80, Sampling(temperature=0))
    return sum(answer.reason != "length" for answer in given) / len(given)


@pytest.mark.slow
def test_answers_and_their_ends_are_learnt(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    shape = ["--model.dim", "64", "--model.max_seq_len", "256", "--train.context", "32", "--data.val_fraction", "0.1"]
    assert train(tiny_config(*shape, "--train.steps", "60"), str(tmp_path / "base"), report=Quiet()) == 0
    base, file = tmp_path / "base/model", tmp_path / "sums.jsonl"
    lines = (json.dumps({"instruction": question, "output": answer}) for question, answer in questions()[HELD_OUT:])
    file.write_text("\n".join(lines), encoding="utf-8")
    assert ends(base) == 0
    words = ["--train.init_from", str(base), "--data.template", "vicuna", "--data.sources", str(file)]
    words += ["--train.context", "256", "--data.val_fraction", "0.2", "--sample.max_new_tokens", "0"]
    words += ["--validate.every", "120", "--train.batch_size", "8", "--checkpoint.every", "120", "--train.steps", "120"]
    for name, more, fall in (("all", ["--optim.lr", "3e-3"], 2.0), ("lora", ["--lora.rank", "8"], 1.5)):
        for seed in ("1", "2", "3"):
            out = tmp_path / f"{name}-{seed}"
            assert train(tiny_config(*words, *more, "--seed", seed), str(out), report=Quiet()) == 0
            records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            losses = [record["val_loss"] for record in records if "val_loss" in record]
            assert losses[-1] < losses[0] - fall, (name, seed, losses)
            share = ends(out / "model") if name == "all" else ends(base, (str(out / "model"),))
            assert share > 0.99, (name, seed, share)
