"""Run folders and a model folder written by the last release, before rooms and `[objective]`: they resume and load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillama import Decoder, Tokenizer, generate
from minillama.commands.cli import main
from minillama.inference.sampling import Sampling

RUNS = Path(__file__).parent / "last_release"

# steps 5 to 8 and the last val_loss, as the last release itself went on
LOSSES = {
    "lm": ([5.176561, 5.033908, 4.897343, 4.784103], 4.565567),
    "glm": ([5.368577, 5.060225, 5.124488, 4.822085], 4.704877),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(RUNS, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    assert main(["train", "--out", name, "--resume", "--train.steps", "8"]) == 0
    said = capsys.readouterr()
    assert "resuming at step 4" in said.out and "[objective]" in said.err
    lines = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
    losses, val_loss = LOSSES[name]
    assert [line["loss"] for line in lines if line.get("loss") is not None][4:] == pytest.approx(losses, rel=1e-4)
    assert lines[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-4)
    assert Path(name, "config.toml").read_text().count(f'[objective]\nname = "{name}"') == 1
    assert main(["show", name]) == 0 and main(["compare", name, name]) == 0


def test_a_model_folder_loads() -> None:
    folder = RUNS / "lm" / "model"
    model = Decoder.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in stored.items())
    completion = generate(model, Tokenizer.load(folder), ["Two boats"], 12, Sampling(temperature=0))[0]
    assert completion.text.split() == ["the", "the", "the"]
