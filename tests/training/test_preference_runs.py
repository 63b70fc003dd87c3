"""Runs of reward models, DPO and KTO: resumed to the bit, written, read again, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillama.data.examples import is_held_out
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.evaluate.rewards import Rewards
from minillama.evaluate.rules import Answer, Reward
from minillama.model.heads import last, open_scores, scores
from minillama.runs.config import RunConfig
from minillama.runs.sections import Stage
from minillama.tokenizer import Tokenizer
from minillama.training.data import load_data
from minillama.training.run import train

from .test_several_models import StopAt, metrics
from .test_trainer import Quiet

Make = Callable[..., RunConfig]


@pytest.fixture
def base(tiny_config: Make, tmp_path: Path) -> Path:
    assert train(tiny_config("--train.steps", "2"), str(tmp_path / "base"), report=Quiet()) == 0
    return tmp_path / "base/model"


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_stages_of_dpo_share_a_reference_and_resume_to_the_bit(
    tiny_config: Make, base: Path, pairs: Path, tmp_path: Path, kind: str
) -> None:
    extra = ["--lora.rank", "2"] if kind == "adapter" else []
    start = base
    if extra:  # whose frozen copy is the reference
        config = tiny_config(*words(base, pairs, "dpo", *extra, "--train.steps", "2", "--optim.lr", "0.1"))
        assert train(config, str(tmp_path / "first"), report=Quiet()) == 0
        start = tmp_path / "first/model"
    config = tiny_config(*words(start, pairs, "dpo", *extra, "--train.dtype", "bfloat16", "--optim.lr", "0.1"))
    own = tmp_path / "own.jsonl"
    own.write_text("".join(pairs.read_text().splitlines(keepends=True)[:9]))
    data = replace(config.data, sources=(Source(path=str(own)),))
    config = replace(config, stages=(Stage(4), Stage(12, data=data)))
    report = Quiet()
    assert train(config, str(tmp_path / "whole"), report=report) == 0
    assert train(config, str(tmp_path / "cut"), report=StopAt(9)) == 143
    assert train(config, str(tmp_path / "cut"), resume=True, report=Quiet()) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert any("stage_val_accuracy" in line for line in metrics(tmp_path / "whole"))
    found = [line["val_chosen_log_ratio"] for line in metrics(tmp_path / "whole") if "val_chosen_log_ratio" in line]
    warned = sum("less likely than at the start" in line for line in report.lines)
    assert warned == sum(ratio < -0.1 for ratio in found) and (warned or kind == "adapter")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twenty pairs of which the chosen answer is the one without a digit."""
    words = ["lamp", "tower", "cart", "fish", "hill"]
    records = [
        {
            "prompt": f"Say {words[i % 5]} {i}.",
            "chosen": f"The {words[i % 5]}.",
            "rejected": f"{i} {words[i % 5]}s!" * 2,
        }
        for i in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def words(base: Path, pairs: Path, name: str, *more: str) -> list[str]:
    given = {"train.init_from": base, "data.sources": pairs, "objective.name": name, "data.template": "vicuna"}
    given |= {"data.val_fraction": 0.3, "train.micro_batch_size": 2, "optim.muon_lr": 0, "optim.lr": 1e-3}
    listed = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return [*listed, "--train.context", "32", *more]


@pytest.mark.parametrize(
    ("name", "kind"), [("reward", "adapter"), ("dpo", "whole"), ("dpo", "adapter"), ("kto", "whole")]
)
def test_a_run_resumes_to_the_bit_inside_and_behind_its_first_epoch(
    tiny_config: Make, base: Path, pairs: Path, tmp_path: Path, name: str, kind: str
) -> None:
    extra = ["--lora.rank", "2"] if kind == "adapter" else []
    config = tiny_config(*words(base, pairs, name, *extra))
    assert train(config, str(tmp_path / "whole"), report=Quiet()) == 0
    for stop in (2, 9):
        assert train(config, str(tmp_path / "cut"), resume=stop > 2, report=StopAt(stop)) == 143
    assert train(config, str(tmp_path / "cut"), resume=True, report=Quiet()) == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert metrics(whole) == metrics(cut)
    file = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    for path in (f"model/{file}", "checkpoints/step-12/optimizer.safetensors"):
        one, two = (load_file(out / path) for out in (whole, cut))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert ("objective/reference" in one) == (name != "reward")
    run = json.loads((whole / "checkpoints/step-12/run.json").read_text())
    assert ("companions" in run) == (name != "reward" and kind == "whole")
    if name == "dpo":
        lines = metrics(whole)
        assert next(line["loss"] for line in lines if "loss" in line) == pytest.approx(math.log(2), abs=1e-7)
        assert lines[0]["val_accuracy"] == 0.5 and lines[-1]["val_accuracy"] == 1
    if name == "reward":
        assert metrics(whole)[-1]["val_accuracy"] == 1
        model, tokenizer = open_scores(whole / "model", torch.float32), Tokenizer.load(whole / "model")
        assert model.config.head == "score" and model.config.pad_id not in tokenizer.stop_ids
        texts = ["A chat. USER: Say fish 3. ASSISTANT: The fish.", "A chat. USER: Say fish 3. ASSISTANT: 3 fishs!"]
        ids = [[*tokenizer.encode(text, bos=True), tokenizer.eos_id] for text in texts]
        with torch.no_grad():
            found = [last(scores(model, torch.tensor([row])), torch.tensor([len(row)])).item() for row in ids]
        assert found[0] > found[1]
        rewards = Rewards([Reward(str(whole / "model"))], tokenizer, tokenizer.eos_id)  # an adapter is a reward, too
        prompt = tokenizer.encode(texts[0].partition(" The")[0], bos=True)
        given = [Answer("", row[len(prompt) :], "", {}, prompt) for row in ids]
        assert rewards(given).total.tolist() == pytest.approx(found, abs=1e-4)


def test_the_first_loss_in_bfloat16_is_ln_2_too(tiny_config: Make, base: Path, pairs: Path, tmp_path: Path) -> None:
    """Policy and reference are cast alike, on rows of the same micro-batches."""
    more = "--train.dtype", "bfloat16", "--train.steps", "1", "--train.micro_batch_size", "3"
    assert train(tiny_config(*words(base, pairs, "dpo", *more)), str(tmp_path / "run"), report=Quiet()) == 0
    lines = metrics(tmp_path / "run")
    assert lines[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-7) and lines[0]["val_kl"] == 0
    assert lines[1]["loss"] == pytest.approx(math.log(2), abs=1e-7) and lines[1]["reward_margin"] == 0


@pytest.mark.hardware("avx512_bf16")
def test_the_reference_computes_with_the_kernels_of_the_policy(tiny_config: Make, pairs: Path, tmp_path: Path) -> None:
    shape = ("--model.dim", "64", "--train.dtype", "bfloat16", "--train.compile", "auto", "--train.steps", "2")
    assert train(tiny_config(*shape), str(tmp_path / "base"), report=Quiet()) == 0
    config = tiny_config(*words(tmp_path / "base/model", pairs, "dpo", *shape[2:]))
    assert train(config, str(tmp_path / "run"), report=Quiet()) == 0
    first = next(line["loss"] for line in metrics(tmp_path / "run") if "loss" in line)
    assert first == pytest.approx(math.log(2), abs=1e-7)


def test_dpo_goes_on_from_the_adapter_of_fine_tuning(
    tiny_config: Make, base: Path, pairs: Path, tmp_path: Path
) -> None:
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join(json.dumps({"prompt": f"Say {i}.", "completion": f"It is {i}."}) + "\n" for i in range(30)))
    lora = ["--lora.rank", "2", "--lora.alpha", "4"]
    sft = [word if word != str(pairs) else str(sums) for word in words(base, pairs, "lm", *lora)]
    assert train(tiny_config(*sft), str(tmp_path / "sft"), report=Quiet()) == 0
    start = tmp_path / "sft/model"
    config, report = tiny_config(*words(start, pairs, "dpo", *lora)), Quiet()
    assert train(config, str(tmp_path / "dpo"), report=report) == 0
    lines = metrics(tmp_path / "dpo")
    assert lines[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert lines[1]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert any(f"chat {base} --adapter" in line for line in report.lines)
    ours = load_file(tmp_path / "dpo/model/adapter_model.safetensors")
    assert ours.keys() == load_file(start / "adapter_model.safetensors").keys()
    assert train(tiny_config(*words(start, pairs, "dpo")), str(tmp_path / "merged"), report=Quiet()) == 0
    assert metrics(tmp_path / "merged")[0]["val_chosen_logp"] == pytest.approx(lines[0]["val_chosen_logp"], abs=1e-4)
    assert train(tiny_config(*words(start, pairs, "reward", *lora)), str(tmp_path / "reward"), report=Quiet()) == 0
    assert open_scores(tmp_path / "reward/model").score is not None
    with pytest.raises(InputError, match=r"adapter in train\.init_from has other settings"):
        train(tiny_config(*words(start, pairs, "dpo", "--lora.rank", "3")), str(tmp_path / "odd"), report=Quiet())


def test_another_reference_is_refused_on_resume(tiny_config: Make, base: Path, pairs: Path, tmp_path: Path) -> None:
    config = tiny_config(*words(base, pairs, "dpo"))
    assert train(config, str(tmp_path / "run"), report=StopAt(5)) == 143
    weights = load_file(base / "model.safetensors")
    other = tiny_config(*words(tmp_path / "run/checkpoints/step-5", pairs, "dpo"))
    assert weights
    with pytest.raises(InputError, match="the reference is not what"):
        train(other, str(tmp_path / "run"), resume=True, report=Quiet())


def test_what_does_not_go_together_is_refused(tiny_config: Make, base: Path, pairs: Path, tmp_path: Path) -> None:
    for more in (("--train.dropout", "0.1"), ("--lora.rank", "2", "--lora.dropout", "0.1")):
        with pytest.raises(InputError, match="under dropout do not compare"):
            tiny_config(*words(base, pairs, "dpo", *more))
    with pytest.raises(InputError, match="rendered by a chat template"):
        tiny_config(*words(base, pairs, "reward", "--data.template", ""))
    with pytest.raises(InputError, match="label smoothing"):
        tiny_config(*words(base, pairs, "dpo", "--objective.loss", "ipo", "--objective.label_smoothing", "0.1"))
    config = tiny_config(*words(base, pairs, "reward", "--train.steps", "1"))
    assert train(config, str(tmp_path / "reward"), report=Quiet()) == 0
    with pytest.raises(InputError, match="a reward model predicts no tokens"):
        tiny_config(*words(tmp_path / "reward/model", pairs, "dpo"))


def test_the_log_warns_of_chosen_answers_that_become_unlikely(
    tiny_config: Make, base: Path, pairs: Path, tmp_path: Path
) -> None:
    swapped = [json.loads(line) for line in pairs.read_text().splitlines()]
    pairs.write_text("".join(json.dumps({**r, "rejected": r["chosen"] + " Yes."}) + "\n" for r in swapped))
    report = Quiet()
    config = tiny_config(*words(base, pairs, "dpo", "--optim.lr", "1e-2"))
    assert train(config, str(tmp_path / "run"), report=report) == 0
    assert any("warning: the chosen answers are" in line for line in report.lines)


def test_a_loss_that_reads_no_probabilities_says_so_whatever_split_they_are_in(
    tiny_config: Make, base: Path, pairs: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    uncertain = next(line for line in lines if is_held_out(line["prompt"], 0.3))
    uncertain["probability"] = 0.75
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for loss, warned in (("hinge", True), ("sigmoid", False)):
        report = Quiet()
        config = tiny_config(*words(base, pairs, "dpo", "--objective.loss", loss))
        load_data(config, Tokenizer.load(base), report)
        assert any("every preference as certain" in line for line in report.lines) == warned
