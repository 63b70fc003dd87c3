"""Faults 33 and 34: a loss that is no number, a loss that leaps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.model import Decoder
from minillama.runs.checkpoint import steps
from minillama.runs.sections import GuardConfig
from minillama.tokenizer.train import TokenizerTrainer
from minillama.training.guard import Guard

PLAIN = ["--train.compile", "false", "--sample.max_new_tokens", "0", "--optim.muon_lr", "0", "--train.dtype", "float32"]


def lines(out: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in text]


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A model in which one rare token's embedding is so large that its square overflows."""
    text = "\n".join(f"Line {i} of {i * i % 91}, the tide is in." for i in range(600))
    tokenizer = TokenizerTrainer("char", 0)([text + "#"])
    config = ModelConfig(
        dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=tokenizer.vocab_size, max_seq_len=16, norm="layer"
    )
    model = Decoder(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.encode("#")[0]] = 3e38
    model.save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    middle = len(text) // 3
    (tmp_path / "text.txt").write_text(text[:middle] + "#" + text[middle:])
    return tmp_path / "base"


def test_fault_33_the_step_is_skipped_and_its_text_is_named(
    poisoned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["train", "--train.init_from", str(poisoned), "--data.sources", str(tmp_path / "text.txt"), *PLAIN]
    words += ["--data.cache", str(tmp_path / "cache"), "--train.batch_size", "4", "--train.steps", "300"]
    words += ["--validate.every", "300", "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    skipped = [line for line in lines(out) if "skipped" in line]
    assert skipped and all(line["loss"] is None or line["grad_norm"] is None for line in skipped)
    tokens = (tmp_path / "text.txt").read_text()
    places = re.findall(r"skipped: .* the rows with a NaN or infinite loss: row \d: .*, tokens (\d+)\.\.(\d+)", said)
    assert places and all("#" in tokens[int(start) : int(stop) + 1] for start, stop in places)
    assert all(f"tokens {start}..{stop}" in str(skipped) for start, stop in places)
    assert said.count("skipped: ") == len(skipped) and f"{len(skipped)} steps were skipped" in said
    final = load_file(out / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in final.values())
    whole = [line["loss"] for line in lines(out) if line.get("loss") is not None]
    assert whole[-1] < whole[0] - 0.5  # the run went on learning


def test_fault_33_after_some_in_a_row_the_run_ends(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ["--train.steps", "60", "--validate.every", "60", "--checkpoint.every", "1", "--optim.warmup_steps", "0"]
    options += ["--optim.lr", "1e37", "--optim.grad_clip", "0", "--guard.max_in_a_row", "4", *PLAIN]
    assert main([*words, *options, "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "4 steps in a row were skipped" in said.err and "lower optim.lr" in said.err
    skipped = [line for line in lines(out) if "skipped" in line]
    assert len(skipped) == 4 and all(line["rows"] for line in skipped)
    assert steps(out / "checkpoints")[-1] == lines(out)[-1]["step"] or "NaN or infinite" in said.out + said.err
    for step in steps(out / "checkpoints"):
        saved = load_file(out / "checkpoints" / f"step-{step}" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in saved.values()), step


def test_fault_34_a_leap_of_the_loss_is_skipped_when_asked_for(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join("The tide is in, and the boats are out." for _ in range(500))
    noise = "".join(chr(33 + (i * i * 31 + 7 * i) % 90) for i in range(60))
    (tmp_path / "text.txt").write_text(text[:9000] + noise + text[9000:])
    options = ["--train.steps", "600", "--validate.every", "600", "--optim.lr", "1e-2", *PLAIN]
    options += ["--tokenizer.kind", "char", "--guard.window", "30"]
    assert main([*words, *options, "--out", str(tmp_path / "plain")]) == 0
    assert not [line for line in lines(tmp_path / "plain") if "skipped" in line]
    capsys.readouterr()
    assert main([*words, *options, "--guard.spike_sigma", "6", "--out", str(tmp_path / "run")]) == 0
    skipped = [line for line in lines(tmp_path / "run") if "skipped" in line]
    assert skipped and all(re.fullmatch(r"loss \S+ above \S+ \+ 6 x \S+", line["skipped"]) for line in skipped)
    said = capsys.readouterr().out
    places = [int(start) for start in re.findall(r"row \d: \S+ \(train\), tokens (\d+)\.\.", said)]
    assert any(9000 - 16 <= place <= 9060 for place in places)


def test_a_guard_judges_by_the_last_losses() -> None:
    guard = Guard(GuardConfig(spike_sigma=3, window=10, max_in_a_row=2))
    for i in range(20):
        assert guard.judge(2 + 0.1 * (i % 2), 1.0) is None
    reason = guard.judge(2.3, 1.0)  # mean 2.05, deviation 0.05
    assert reason == "loss 2.3000 above 2.0500 + 3 x 0.0500"
    assert guard.judge(2.19, 1.0) is None and len(guard.recent) == 10
    assert guard.judge(float("nan"), 1.0) == "loss nan" and guard.judge(2.0, float("inf")) == "gradient norm inf"
    again = Guard(guard.config)
    again.restore(json.loads(json.dumps(guard.state())))
    assert again.recent == guard.recent and again.skipped == 3 and again.in_a_row == 0
