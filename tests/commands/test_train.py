"""`train CONFIG`: the model that a configuration starts from is made first."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillama import Decoder, ModelConfig
from minillama.commands import cli
from minillama.runs.config import RunConfig

SMALL = ModelConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=300, max_seq_len=64)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and steps of the runs, each of which leaves a model; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = []

    def train(config: RunConfig, out: str | None, *_: bool) -> int:
        found.append((config.name, config.train.steps))
        Decoder(SMALL).save_pretrained(Path(out or f"runs/{config.name}") / "model")
        return 0

    monkeypatch.setattr("minillama.training.run.train", train)
    return found


def test_what_a_configuration_starts_from_is_trained_first(
    trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "reward", "--train.steps", "3", "--out", "elsewhere"]) == 0
    assert [name for name, _ in trained] == ["tiny", "sft", "reward"] and trained[-1][1] == 3 and trained[1][1] > 3
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "reward needs runs/tiny/model, which is not there: training that first",
        "reward needs runs/sft/model, which is not there: training that first",
    ]
    trained.clear()
    assert cli.main(["train", "reward"]) == 0
    assert [name for name, _ in trained] == ["reward"]


@pytest.mark.parametrize("why", ["named by the user", "a run that is not done", "several processes"])
def test_a_model_is_made_only_where_nothing_else_was_said(
    why: str, trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--train.init_from", "runs/arithmetic/model"] if why == "named by the user" else []
    if why == "a run that is not done":
        Path("runs/arithmetic").mkdir(parents=True)
    if why == "several processes":
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "grpo", *words]) == 1
    assert "no such model" in capsys.readouterr().err and not trained
