"""Accuracy on evaluation sets while training: in the metrics, on the curve, in comparisons, in provenance."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.model import Decoder
from minillama.runs.config import RunConfig
from minillama.runs.validation import ValidateConfig
from minillama.tokenizer import byte_tokenizer
from minillama.training.probes import TaskAccuracy
from minillama.training.ranks import Ranks
from minillama.training.run import train


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    folder = tmp_path / "sets" / "piqa"
    folder.mkdir(parents=True)
    lines = (json.dumps({"goal": f"Go {i}.", "sol1": "left", "sol2": "right"}) + "\n" for i in range(5))
    (folder / "valid.jsonl").write_text("".join(lines))
    (folder / "valid-labels.lst").write_text("0\n1\n0\n1\n0\n")
    return tmp_path / "sets"


def test_accuracies_are_recorded_and_shown(
    tiny_config: Callable[..., RunConfig], sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--validate.tasks", "piqa", "--validate.data", str(sets), "--validate.items", "4"]
    out = tmp_path / "run"
    assert train(tiny_config(*words), str(out)) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["piqa_acc_norm"] for record in records if "piqa_acc_norm" in record}
    assert sorted(found) == [0, 6, 12] and set(found.values()) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    starts = [json.loads(line) for line in (out / "provenance.jsonl").read_text().splitlines()]
    assert starts[0]["decontaminated"] == {}
    capsys.readouterr()
    assert main(["show", str(out)]) == 0 and "a: piqa_acc_norm" in capsys.readouterr().out
    assert main(["compare", str(out), str(out)]) == 0 and "piqa_acc_norm at step" in capsys.readouterr().out


def test_items_that_lose_tokens_are_counted(sets: Path) -> None:
    """Of five prompts of some 30 bytes; where all fit there is no such number."""
    config = ValidateConfig(tasks=("piqa",), data=str(sets), items=5)
    accuracy = TaskAccuracy(config, tokenizer := byte_tokenizer(), Ranks())
    shape = ModelConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=tokenizer.vocab_size, max_seq_len=99)
    assert accuracy(Decoder(shape)).keys() == {"piqa_acc_norm"}
    assert accuracy(Decoder(replace(shape, max_seq_len=24)))["piqa_truncated"] == 5


def test_a_run_says_that_its_data_is_decontaminated(
    tiny_config: Callable[..., RunConfig], sets: Path, text_file: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "t.txt", tmp_path / "clean.txt"
    source.write_text(text_file.read_text())
    assert main(["data", "decontaminate", str(source), "--against", str(sets), "--remove", str(out)]) == 0
    config = tiny_config("--train.steps", "1")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.txt").write_text(text_file.read_text())
    (tmp_path / "more/scan.pdf").touch()
    more = (Source(path=str(out)), Source(path=str(tmp_path / "more")))
    config = replace(config, data=replace(config.data, sources=(*more, *config.data.sources)))
    assert train(config, str(tmp_path / "run")) == 0
    (start,) = [json.loads(line) for line in (tmp_path / "run/provenance.jsonl").read_text().splitlines()]
    assert [*start["decontaminated"]] == [str(out)]
    assert start["left_out"] == {"files": {".pdf": [1, ["scan.pdf"]]}}
    made = start["decontaminated"][str(out)]
    assert (made["source"], made["n"], made["items"], made["removed"]) == (str(source), 13, {"piqa": 5}, 0)


def test_settings_are_named_and_home_is_expanded(
    tiny_config: Callable[..., RunConfig], sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(sets.parent))
    config = tiny_config("--validate.tasks", "piqa", "--validate.data", "~/sets")
    assert len(TaskAccuracy(config.validate, byte_tokenizer(), Ranks()).sets["piqa"]) == 5
    with pytest.raises(InputError, match="no such evaluation set") as error:
        TaskAccuracy(replace(config.validate, tasks=("pika",)), byte_tokenizer(), Ranks())
    assert error.value.where == "validate.tasks"


def test_a_missing_set_stops_before_the_first_step(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder of the evaluation sets"):
        tiny_config("--validate.tasks", "piqa")
    config = tiny_config("--validate.tasks", "piqa", "--validate.data", str(tmp_path / "none"))
    with pytest.raises(InputError, match="files of PIQA are missing"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
