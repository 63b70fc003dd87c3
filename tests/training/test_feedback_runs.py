"""Whole runs of GRPO and PPO: exact resume inside a rollout, metrics, samples, folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.model import Decoder
from minillama.model.heads import open_scores, with_score
from minillama.runs.config import RunConfig, load_run_config
from minillama.runs.feedback import GRPOConfig, PPOConfig
from minillama.runs.sections import Stage
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.template import load_template
from minillama.tokenizer.train import byte_tokenizer, train_byte_bpe
from minillama.training.run import train

from .test_several_models import StopAt
from .test_trainer import Quiet

Make = Callable[..., RunConfig]
TIMES = ("seconds", "tokens_per_second", "mfu", "rollout_tokens_per_second")

ROLLOUT = ("--objective.max_new_tokens", "4", "--objective.samples", "2", "--objective.minibatches", "2")
GRPO = ("--objective.name", "grpo", "--objective.epochs", "2", "--objective.kl", "k3", *ROLLOUT)
PPO = ("--objective.name", "ppo", "--objective.epochs", "2", *ROLLOUT, "--objective.kl_target", "0.1")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A random model with a chat template."""
    path = tmp_path / "start"
    shape = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=257, max_seq_len=32)
    model = Decoder(shape)
    model.init_weights(torch.Generator().manual_seed(2))
    model.save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.with_chat_template(load_template("plain", tokenizer).source).save(path)
    return path


def words(start: Path, *more: str) -> list[str]:
    data = ["--data.sources", "sorting:2", "--data.template", "auto", "--data.val_fraction", "0.2"]
    rewards = ["--objective.rewards", "verified", "0.5*repetition"]
    return [*data, *rewards, "--train.init_from", str(start), "--validate.tokens", "0", *more]


def metrics(out: Path) -> list[dict]:  # type: ignore[type-arg]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize("which", [GRPO, PPO], ids=["grpo", "ppo"])
def test_a_run_that_stops_inside_a_rollout_resumes_to_the_bit(
    tiny_config: Make, start: Path, tmp_path: Path, which: tuple[str, ...], text_file: Path
) -> None:
    more = ("--objective.average_decay", "0.5", "--objective.text", str(text_file)) if which is PPO else ()
    config = tiny_config(*words(start, *which, *more, "--train.micro_batch_size", "3"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(config, str(whole), report=Quiet()) == 0
    for stop in (3, 9):  # in the second epoch of the first rollout, and behind the first step of the third
        assert train(config, str(cut), resume=stop > 3, report=StopAt(stop)) == 143
        held = load_file(cut / f"checkpoints/step-{stop}/optimizer.safetensors")
        assert {"objective/tokens", "objective/mask", "objective/old", "objective/advantages"} <= held.keys()
        assert not any("reference/" in name for name in held)
    assert train(config, str(cut), resume=True, report=Quiet()) == 0
    assert metrics(whole) == metrics(cut)
    for name in ("optimizer.safetensors", "model.safetensors"):
        one, two = (load_file(out / "checkpoints" / "step-12" / name) for out in (whole, cut))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    lines = [line for line in metrics(whole) if "lr" in line]
    rollouts = [line["step"] for line in lines if "reward" in line]
    assert rollouts == [1, 5, 9] and lines[0]["kl"] == 0 and lines[0]["clipped"] == 0 == lines[0]["approx_kl"]
    parts = {"reward_verified", "reward_repetition", "answer_length", "ended", "distinct_2", "rollout_tokens"}
    assert parts <= lines[0].keys() and lines[3]["approx_kl"] > 0
    assert lines[0]["reward"] == pytest.approx(lines[0]["reward_verified"] + 0.5 * lines[0]["reward_repetition"])


@pytest.mark.parametrize("which", [GRPO, PPO], ids=["grpo", "ppo"])
def test_the_first_ratios_in_bfloat16_are_1_too(
    tiny_config: Make, start: Path, tmp_path: Path, which: tuple[str, ...]
) -> None:
    more = "--train.dtype", "bfloat16", "--train.steps", "1", "--train.micro_batch_size", "3"
    assert train(tiny_config(*words(start, *which, *more)), str(tmp_path / "run"), report=Quiet()) == 0
    first = next(line for line in metrics(tmp_path / "run") if "lr" in line)
    assert first["kl"] == 0 == first["clipped"] == first["approx_kl"] and first["entropy"] > 1


def test_what_a_run_of_ppo_leaves_behind(tiny_config: Make, start: Path, tmp_path: Path, text_file: Path) -> None:
    more = ("--objective.average_decay", "0.5", "--objective.text", str(text_file), "--train.steps", "6")
    report = Quiet()
    assert train(tiny_config(*words(start, *PPO, *more)), str(tmp_path / "run"), report=report) == 0
    value = open_scores(tmp_path / "run/value")
    average, final = (Decoder.from_pretrained(tmp_path / "run" / name) for name in ("average", "model"))
    first = Decoder.from_pretrained(start)
    assert value.score is not None
    moved, behind = (
        (p - q).abs().max().item()
        for p, q in ((final.output_weight, first.output_weight), (average.output_weight, final.output_weight))
    )
    assert 0 < behind < moved
    lines = [line for line in metrics(tmp_path / "run") if "val_reward" in line]
    assert [line["step"] for line in lines] == [0, 6]
    assert {"question", "answer", "reward", "rewards"} == lines[0]["sample"].keys()
    assert lines[0]["sample"]["question"].endswith(">") and any("| question: " in line for line in report.lines)
    assert any("best val_reward" in line for line in report.lines)
    steps = [line for line in metrics(tmp_path / "run") if "loss_value" in line]
    assert len(steps) == 6 and steps[0]["loss_text"] > steps[-1]["loss_text"] > 0


def test_the_value_model_learns_at_a_rate_of_its_own(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    first, moved = Decoder.from_pretrained(start).model.norm.weight, list[float]()
    for rate in ("1", "4"):
        more = ("--objective.critic_rate", rate, "--train.steps", "1")
        assert train(tiny_config(*words(start, *PPO, *more)), str(tmp_path / rate), report=Quiet()) == 0
        for name in ("value", "model"):
            moved.append((Decoder.from_pretrained(tmp_path / rate / name).model.norm.weight - first).abs().max().item())
    value, policy, faster, same = moved
    assert same == policy > 0 and faster == pytest.approx(4 * value, rel=0.02)


def test_a_shared_critic_and_a_reward_model(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    config = tiny_config(*words(start, *PPO, "--objective.critic", "shared", "--train.steps", "4"))
    assert train(config, str(tmp_path / "run"), report=Quiet()) == 0
    assert not (tmp_path / "run/value").exists()
    assert train(tiny_config(*words(start, *PPO, "--train.steps", "2")), str(tmp_path / "one"), report=Quiet()) == 0
    reward = str(tmp_path / "one/value")  # a value model is a reward model
    more = ("--objective.critic_from", reward, "--train.steps", "4")
    arguments = [reward if word == "verified" else word for word in words(start, *PPO, *more)]
    assert train(tiny_config(*arguments), str(tmp_path / "two"), report=Quiet()) == 0
    run = json.loads((tmp_path / "two/checkpoints/step-4/run.json").read_text())
    assert set(run["companions"]) == {reward, "reference"}
    assert any("reward_value" in line for line in metrics(tmp_path / "two"))


def test_a_reward_model_of_the_same_context_reads_every_prompt(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    """The longest, its answer, and the end token behind it."""
    scored = with_score(Decoder.from_pretrained(start), torch.Generator().manual_seed(1))
    scored.save_pretrained(tmp_path / "scored")
    Tokenizer.load(start).save(tmp_path / "scored")
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": "a" * n}) + "\n" for n in range(8, 40)))  # until none has room
    changed = {"verified": str(tmp_path / "scored"), "sorting:2": str(asked)}
    arguments = [changed.get(word, word) for word in words(start, *GRPO, "--train.steps", "2")]
    context = ("--train.context", "32", "--train.batch_size", "4")
    assert train(tiny_config(*arguments, *context), str(tmp_path / "run"), report=Quiet()) == 0


@pytest.fixture
def adapter(tiny_config: Make, start: Path, tmp_path: Path) -> Path:
    """A trained adapter on the start."""
    config = tiny_config(*words(start, *GRPO, "--lora.rank", "2", "--train.steps", "2", "--optim.lr", "0.1"))
    assert train(config, str(tmp_path / "first"), report=Quiet()) == 0
    return tmp_path / "first/model"


@pytest.mark.parametrize("goes_on", [False, True], ids=["fresh", "trained"])
def test_a_critic_of_its_own_under_an_adapter(
    tiny_config: Make, start: Path, adapter: Path, tmp_path: Path, goes_on: bool
) -> None:
    more = "--lora.rank", "2", "--train.steps", "2", "--train.dtype", "bfloat16"
    config = tiny_config(*words(adapter if goes_on else start, *PPO, *more))
    assert train(config, str(tmp_path / "run"), report=Quiet()) == 0
    value, plain = open_scores(tmp_path / "run/value"), Decoder.from_pretrained(start)
    assert value.config.dim == plain.config.dim and value.state_dict().keys() - {"score.weight"} <= set(
        plain.state_dict()
    )


def test_a_critic_that_cannot_be(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    more = "--lora.rank", "2", "--train.steps", "2", "--train.quantize", "int8"
    with pytest.raises(InputError, match="quantized weights") as found:
        train(tiny_config(*words(start, *PPO, *more)), str(tmp_path / "run"), report=Quiet())
    assert "--objective.critic shared" in str(found.value)
    config = tiny_config(*words(start, *PPO, *more, "--objective.critic", "shared"))
    assert train(config, str(tmp_path / "run"), report=Quiet()) == 0
    other = tmp_path / "other"
    with_score(Decoder(ModelConfig(dim=32, n_layers=1, n_heads=4, vocab_size=90, max_seq_len=32))).save_pretrained(
        other
    )
    train_byte_bpe(["abc abc"], 258).save(other)
    config = tiny_config(*words(start, *PPO, "--objective.critic_from", str(other)))
    with pytest.raises(InputError, match="another tokenizer"):
        train(config, str(tmp_path / "two"), report=Quiet())
    small = ModelConfig(dim=32, n_layers=1, n_heads=4, vocab_size=257, max_seq_len=6)
    with_score(Decoder(small)).save_pretrained(other)
    byte_tokenizer().save(other)
    with pytest.raises(InputError, match=r"shorter than a prompt[\s\S]*other"):
        train(config, str(tmp_path / "three"), report=Quiet())
    config = tiny_config(*(str(other) if word == "verified" else word for word in words(start, *PPO)))
    with pytest.raises(InputError, match=r"shorter than a prompt[\s\S]*other"):
        train(config, str(tmp_path / "four"), report=Quiet())


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_alarm_of_a_policy_that_left_its_reference(tiny_config: Make, start: Path, tmp_path: Path, kl: str) -> None:
    report = Quiet()
    more = ("--objective.minibatches", "1", "--objective.kl", kl, "--objective.alarm_kl", "0.001", "--train.steps", "6")
    more += ("--train.batch_size", "16", "--validate.every", "2")
    (tmp_path / "mine.py").write_text("def low(prompt, ids, text, record):\n    return -sum(ids) / len(ids)\n")
    given = words(start, "--objective.name", "grpo", *ROLLOUT, *more, "--optim.lr", "0.05")
    config = tiny_config(*(f"{tmp_path}/mine.py:low" if word == "verified" else word for word in given))
    assert train(config, str(tmp_path / "run"), report=report) == 0
    assert any("nats per answer to the start model" in line for line in report.lines)


def test_rollouts_have_one_set_of_prompts(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    config = tiny_config(*words(start, *GRPO))
    with pytest.raises(InputError, match="one set of prompts"):
        replace(config, stages=(Stage(4), Stage(8, data=config.data)))


def test_a_loss_around_0_has_no_spikes(tiny_config: Make, start: Path) -> None:
    for which in (GRPO, PPO):
        with pytest.raises(InputError, match=r"has no spikes[\s\S]*guard.spike_sigma"):
            tiny_config(*words(start, *which), "--guard.spike_sigma", "6")


def test_prompts_of_which_no_answer_can_be_scored_are_refused(tiny_config: Make, start: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(30)))
    own = {"sorting:2": str(tmp_path / "asked.jsonl"), "0.5*repetition": "ended"}
    given = [own.get(word, word) for word in words(start, *GRPO)]
    with pytest.raises(
        InputError, match=r"no answer of the first rollout[\s\S]*nothing from verified for[\s\S]*an answer"
    ):
        train(tiny_config(*given), str(tmp_path / "run"), report=Quiet())


def test_settings_of_the_command_line_and_of_a_file(start: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    text = """
[model]
dim = 32
n_layers = 1
n_heads = 2
vocab_size = 257
max_seq_len = 32
[objective]
name = "grpo"
max_new_tokens = 5
[[objective.rewards]]
name = "verified"
[[objective.rewards]]
name = "format"
pattern = "[0-9]+"
weight = 0.5
[data]
template = "plain"
"""
    path.write_text(text)
    settings = load_run_config(str(path)).objective
    assert [r.name for r in settings.rewards] == ["verified", "format"] and settings.rewards[1].weight == 0.5  # type: ignore[union-attr]
    for old, new, message in (
        ('template = "plain"', "", "prompts are rendered by a chat template"),
        ('pattern = "[0-9]+"', "", r"run.toml:\d+, objective.rewards.1.*\.pattern"),
        ("max_new_tokens = 5", "top_k = 50", "unknown key 'top_k'"),
        ("max_new_tokens = 5", "samples = 5", "no whole number of prompts"),
        ("max_new_tokens = 5", "max_new_tokens = 5\n[train]\ndropout = 0.1", "do not repeat"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=message):
            load_run_config(str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 3}, "no whole number of prompts"),
        ({"samples": 1}, "no baseline"),
        ({"max_new_tokens": 64}, "no room for its prompt"),
        ({"dual_clip": 1.1}, "lies within the clipping"),
        ({"dual_clip": 3.0, "policy": "cispo"}, "CISPO has no dual clipping"),
        ({"dropout": 0.1}, "log-probabilities do not repeat"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    dropout = settings.pop("dropout", 0.0)
    with pytest.raises(InputError, match=message):
        GRPOConfig(**settings).check(8, 64 if "max_new_tokens" in settings else 80, dropout)
    with pytest.raises(InputError, match=r"compares the answers[\s\S]*where: objective.samples"):
        PPOConfig(oversample=2).check(8, 80, 0.0)
    with pytest.raises(InputError, match="starts from no reward model"):
        PPOConfig(critic="shared", critic_from="runs/reward/model")
    with pytest.raises(InputError, match="adaptive coefficient"):
        PPOConfig(kl="k3", kl_target=1.0)
    with pytest.raises(InputError, match=r"stays 0[\s\S]*where: beta"):
        PPOConfig(kl_target=1.0, beta=0.0)
