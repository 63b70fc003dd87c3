"""Faults 28 and 30: N steps, a stop, a resume and M steps are N + M steps to the bit; a changed configuration."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.model import Decoder
from minillama.runs.config import RunConfig, load_run_config
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.train import TokenizerTrainer
from minillama.training.run import train

MEMBERS = [
    "llama",
    "glm",
    "rwkv",
    *(pytest.param(m, marks=pytest.mark.slow) for m in ("palm", "bloom", "chatglm", "chatglm2")),
]
TIMED = ("tokens_per_second", "mfu", "seconds")


class Quiet:
    """Says nothing, and sends a signal after a step."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at = stop_at
        self.lines: list[str] = []

    def start(self, step: int, steps: int) -> None: ...

    def step(self, record: dict) -> None:
        if record["step"] == self.stop_at:
            signal.raise_signal(signal.SIGTERM)

    def stop(self) -> None: ...

    def say(self, text: str = "") -> None:
        self.lines.append(text)


def shape(member: str) -> list[str]:
    """The member's switches on a shape of a few thousand parameters."""
    words = ["--model.dim", "48", "--model.n_layers", "2", "--model.hidden_dim", "80", "--model.vocab_size", "310"]
    words += ["--model.max_seq_len", "32"]
    heads = {"rwkv": ("1", "1", "48"), "palm": ("6", "1", "8"), "llama": ("6", "2", "8"), "chatglm2": ("6", "2", "8")}
    for name, value in zip(("n_heads", "n_kv_heads", "head_dim"), heads.get(member, ("6", "6", "8")), strict=True):
        words += [f"--model.{name}", value]
    return [*words, "--model.rotary_dim", "4"] if member == "chatglm2" else words


def settings(text: Path, tmp_path: Path) -> list[str]:
    return [
        *("--data.sources", str(text), "--data.cache", str(tmp_path / "cache"), "--train.steps", "20"),
        *("--train.batch_size", "4", "--train.compile", "false", "--sample.max_new_tokens", "0"),
        *("--validate.every", "5", "--validate.tokens", "300", "--checkpoint.every", "4"),
    ]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Line {i} of {i * i % 91}. The tide is in; go home." for i in range(400)))
    return path


def lines(out: Path) -> list[dict]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Everything the last checkpoint holds."""
    folder = out / "checkpoints" / "step-20"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def assert_equal_runs(config: RunConfig, tmp_path: Path, stops: tuple[int, ...]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(config, str(whole), report=Quiet()) == 0
    for i, stop in enumerate(stops):
        assert train(config, str(parts), resume=i > 0, report=Quiet(stop)) == 143
    assert train(config, str(parts), resume=True, report=Quiet()) == 0
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert lines(whole) == lines(parts)


@pytest.mark.parametrize("member", MEMBERS)
def test_fault_28_every_member_with_accumulation_and_dropout(member: str, text: Path, tmp_path: Path) -> None:
    words = [*shape(member), *settings(text, tmp_path), "--train.micro_batch_size", "3", "--train.dropout", "0.1"]
    words += ["--optim.muon_lr", "0.01" if member in ("llama", "glm") else "0"]
    assert_equal_runs(load_run_config("tiny", words, f"{member}-tiny"), tmp_path, (10,))


@pytest.mark.parametrize(
    "words",
    [
        ["--optim.optimizer", "adafactor", "--optim.schedule", "rsqrt", "--optim.muon_lr", "0"],
        pytest.param(["--train.dtype", "bfloat16"], marks=pytest.mark.slow),  # seconds per step where it is emulated
        ["--guard.spike_sigma", "2", "--optim.lr", "0.05", "--optim.muon_lr", "0"],
        ["--train.deterministic", "true", "--metrics.every", "3", "--data.mask_documents", "true"],
    ],
    ids=["adafactor", "bfloat16", "spikes", "deterministic"],
)
def test_fault_28_every_kind_of_state(words: list[str], text: Path, tmp_path: Path) -> None:
    """Stopped twice: at a step with a validation, and between two."""
    words = [*shape("llama"), *settings(text, tmp_path), *words]
    assert_equal_runs(load_run_config("tiny", words, "llama-tiny"), tmp_path, (5, 13))


def test_fault_28_cloze_questions(tmp_path: Path) -> None:
    records = [{"text": f"The {a} was {b}.", "label": b} for a in ("soup", "walk", "song") for b in ("good", "bad")] * 5
    source = tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps(record | {"n": i}) + "\n" for i, record in enumerate(records)))
    from minillama.tokenizer.blanks import BLANK_TOKENS

    tokenizer = TokenizerTrainer("byte-bpe", 280, special=BLANK_TOKENS)([record["text"] for record in records])
    base = replace(
        ModelConfig.load("glm-tiny"),
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        head_dim=8,
        hidden_dim=48,
        vocab_size=tokenizer.vocab_size,
        max_seq_len=32,
        tie_embeddings=False,
    )
    Decoder(base).save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    words = [*settings(source, tmp_path), "--objective.name", "cloze", "--train.init_from", str(tmp_path / "base")]
    words += ["--objective.pattern", "{text} So: [MASK].", "--objective.verbalizers", "good=fine", "bad=poor"]
    words += ["--data.val_fraction", "0.3", "--train.dropout", "0.1", "--train.micro_batch_size", "3"]
    assert_equal_runs(load_run_config("tiny", words), tmp_path, (10,))


def test_fault_28_other_micro_batches_read_the_same_data(text: Path, tmp_path: Path) -> None:
    # in bfloat16 the gradients of two halves are rounded otherwise than those of the whole; in float32 sums of other
    # lengths still differ in their last bits, and twenty steps carry that on
    words = [*shape("glm"), *settings(text, tmp_path), "--train.dtype", "float32"]
    plain = load_run_config("tiny", words, "glm-tiny")
    cut = load_run_config("tiny", [*words, "--train.micro_batch_size", "1"], "glm-tiny")
    assert train(plain, str(tmp_path / "plain"), report=Quiet()) == 0
    assert train(plain, str(tmp_path / "cut"), report=Quiet(10)) == 143
    report = Quiet()
    assert train(cut, str(tmp_path / "cut"), resume=True, report=report) == 0
    assert "resuming with train.micro_batch_size = 1, was 0" in report.lines
    a, b = lines(tmp_path / "plain"), lines(tmp_path / "cut")
    assert [line["tokens"] for line in a] == [line["tokens"] for line in b]
    assert [line["loss"] for line in a[1:]] == pytest.approx([line["loss"] for line in b[1:]], rel=1e-3)


@pytest.mark.slow
def test_fault_28_compiled(text: Path, tmp_path: Path) -> None:
    words = [*shape("llama"), *settings(text, tmp_path), "--train.dropout", "0.1", "--train.micro_batch_size", "2"]
    config = load_run_config("tiny", [*words, "--train.compile", "true"], "llama-tiny")
    assert_equal_runs(config, tmp_path, (10,))


def test_fault_30_harmless_changes_are_shown_and_harmful_ones_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *shape("llama"), *settings(text, tmp_path), "--out", str(tmp_path / "run")]
    assert main([*words, "--train.steps", "6"]) == 0
    before = (tmp_path / "run" / "config.toml").read_bytes()
    capsys.readouterr()
    for option in (
        ["--seed", "5"],
        ["--optim.muon_lr", "0.0"],
        ["--train.batch_size", "2"],
        ["--train.context", "16"],
        ["--optim.beta2", "0.9"],
    ):
        assert main([*words, "--resume", *option]) == 1
        error = capsys.readouterr().err
        key, value = option[0].removeprefix("--"), option[1]
        assert "cannot be resumed with these changes" in error and f"{key} = {value}, was " in error
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    assert main([*words, "--resume", "--train.steps", "8", "--optim.lr", "1e-3", "--optim.muon_lr", "0.01"]) == 0
    said = capsys.readouterr().out
    assert "resuming with train.steps = 8, was 6" in said and "resuming with optim.lr = 0.001, was 0.006" in said


def test_fault_10_data_replaced_before_a_resume(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *shape("llama"), *settings(text, tmp_path), "--out", str(tmp_path / "run")]
    assert main([*words, "--train.steps", "6"]) == 0
    text.write_text(text.read_text().replace("tide", "sea"))
    Tokenizer.load(tmp_path / "run" / "model")
    assert main([*words, "--resume"]) == 1
    assert "the data is not what the checkpoint was trained on" in capsys.readouterr().err


def test_a_finished_run_that_goes_on_has_no_old_model(text: Path, tmp_path: Path) -> None:
    """Stopped at its last step it is not finished: the model that was there is of fewer steps."""
    words = [*shape("llama"), *settings(text, tmp_path)]
    out = tmp_path / "run"
    config = [load_run_config("tiny", [*words, "--train.steps", steps], "llama-tiny") for steps in ("6", "8")]
    assert train(config[0], str(out), report=Quiet()) == 0
    assert train(config[1], str(out), resume=True, report=Quiet(8)) == 143
    assert not (out / "model").exists()
    assert train(config[1], str(out), resume=True, report=Quiet()) == 0
    last = load_file(out / "checkpoints" / "step-8" / "model.safetensors")
    model = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(last[name], model[name]) for name in last)
    assert lines(out)[-1]["step"] == 8 and "val_loss" in lines(out)[-1]


def test_a_signal_between_the_step_and_its_save_loses_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minillama.training.guard import Guard

    config = load_run_config("tiny", [*shape("llama"), *settings(text, tmp_path)], "llama-tiny")
    asked = []

    def is_over(guard: Guard) -> bool:
        asked.append(1)
        if len(asked) == 7:  # behind the question whether a signal came, in step 7 or before
            signal.raise_signal(signal.SIGTERM)
        return False

    monkeypatch.setattr(Guard, "is_over", property(is_over))
    report = Quiet()
    assert train(config, str(tmp_path / "run"), report=report) == 143
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    said = next(line for line in report.lines if line.startswith("stopped by"))
    assert said.split("saved at step ")[1].split(".")[0] in [name.removeprefix("step-") for name in kept]
    assert train(config, str(tmp_path / "run"), resume=True, report=Quiet()) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(21)) and kept


def test_another_error_does_not_lose_the_checkpoint_that_is_being_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    from minillama.errors import InputError
    from minillama.runs.checkpoint import CheckpointCopy, newest_checkpoint

    config = load_run_config("tiny", [*shape("llama"), *settings(text, tmp_path)], "llama-tiny")
    monkeypatch.setattr(CheckpointCopy, "check", lambda snapshot: time.sleep(1))

    class Failing(Quiet):
        def step(self, record: dict) -> None:
            if record["step"] == 5:
                raise InputError("something else")

    with pytest.raises(InputError, match="something else"):
        train(config, str(tmp_path / "run"), report=Failing())
    found, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None and found.step == 4


def test_nothing_is_replaced_before_all_is_checked(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *shape("llama"), *settings(text, tmp_path), "--out", str(tmp_path / "run")]
    assert main([*words, "--train.steps", "2"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main([*words, "--overwrite", "--data.sources", str(tmp_path / "nothing.txt")]) == 1
    text.write_text("too short")
    assert main([*words, "--overwrite"]) == 1
    assert before == {path: path.read_bytes() for path in before}
