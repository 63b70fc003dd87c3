"""`minillama show RUN` and `minillama compare RUN RUN` of runs that were really trained."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minillama.commands.cli import main
from minillama.commands.tables import plain
from minillama.errors import InputError
from minillama.runs.config import load_run_config
from minillama.runs.plot import chart
from minillama.runs.report import SilentReport
from minillama.training.objectives import Objective, make
from minillama.training.run import train

Two = Callable[[], tuple[Path, Path]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("\n".join(f"Line {i} of {i * i % 91}, the tide is in." for i in range(400)))
    words = ["train", "--model.dim", "16", "--model.n_layers", "1", "--model.n_heads", "2", "--model.n_kv_heads", "1"]
    words += ["--model.hidden_dim", "24", "--model.vocab_size", "300", "--model.max_seq_len", "16"]
    words += ["--train.steps", "6", "--train.batch_size", "2", "--validate.every", "2", "--train.compile", "false"]
    words += ["--data.sources", str(folder / "text.txt"), "--data.cache", str(folder / "cache")]
    words += ["--sample.max_new_tokens", "0"]
    assert main([*words, "--out", str(folder / "a")]) == 0
    assert main([*words, "--out", str(folder / "b"), "--optim.lr", "0.5", "--seed", "7"]) == 0
    assert main([*words, "--out", str(folder / "a"), "--resume", "--train.steps", "8"]) == 0
    return folder / "a", folder / "b"


def test_show_prints_origin_configuration_and_curve(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(runs[0])]) == 0
    said = capsys.readouterr().out
    assert "finished" in said and "command " in said and "optim.lr" not in said and len(said.splitlines()) < 35
    assert main(["show", str(runs[0]), "--all"]) == 0
    said = capsys.readouterr().out
    for word in ("finished", "8 of 8", "start 1 of 2", "start 2 of 2", "versions.torch", "git.commit", "optim.lr"):
        assert word in said, word
    assert said.rstrip().endswith("step; l loss, v val_loss")


def test_show_as_json_records_what_a_run_depends_on(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(runs[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [start["step"] for start in found["starts"]] == [0, 6]
    for start in found["starts"]:
        assert start["seed"] == 1 and len(start["data"]) == len(start["tokenizer"]) == 64
        assert {"minillama", "python", "torch", "numpy"} <= set(start["versions"])
    assert found["starts"][0]["data"] == found["starts"][1]["data"]
    assert found["config"]["train"]["steps"] == 8
    summary = found["summary"]
    assert summary["best_step"] in summary["checkpoints"] and summary["skipped_steps"] == 0
    losses = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert summary["best_val_loss"] == min(line["val_loss"] for line in losses[1:] if "val_loss" in line)


def test_compare_names_the_differences(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"] == {"seed": [1, 7], "train.steps": [8, 6], "optim.lr": [0.006, 0.5]}
    assert [point[0] for point in found["val_loss"][1]] == [0, 2, 4, 6]
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "optim.lr" in said and "0.5" in said and "val_loss at step" in said
    assert f"step; a: {runs[0]}, b: {runs[1]}" in said
    assert "train.batch_size" not in said


def test_compare_names_objectives(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the configuration, and those of Python code, which no other command line resumes."""

    def same(*given: Any) -> Objective:
        return make(*given)

    config = load_run_config(str(runs[1] / "config.toml"))
    train(config, str(tmp_path / "own"), objective=same)
    assert main(["compare", str(runs[1]), str(tmp_path / "own"), "--json"]) == 0
    differ = json.loads(capsys.readouterr().out.splitlines()[-1])["differences"]
    assert differ == {"Python objective": [None, "test_compare_names_objectives.<locals>.same"]}
    assert main(["train", "--out", str(tmp_path / "own"), "--resume", "--train.steps", "8"]) == 1
    assert "expected: objective=test_compare_names_objectives" in capsys.readouterr().err
    assert train(config, str(tmp_path / "own"), resume=True, objective=same) == 0
    shutil.copytree(runs[1], tmp_path / "z")
    text = (runs[1] / "config.toml").read_text()
    (tmp_path / "z" / "config.toml").write_text(text.replace("z_loss = 0.0", "z_loss = 0.5"))
    assert main(["compare", str(runs[1]), str(tmp_path / "z"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["differences"] == {"objective.z_loss": [0, 0.5]}


def test_a_renamed_or_unrecorded_objective_goes_on(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Of the record only whether there was one of Python code is held against a resumed run."""

    class Said(SilentReport):
        def say(self, text: str = "") -> None:
            said.append(text)

    said: list[str] = []
    config, out = load_run_config(str(runs[1] / "config.toml")), tmp_path / "own"
    train(config, out, objective=partial(make))
    assert train(config, out, resume=True, objective=lambda *given: make(*given), report=Said()) == 0
    assert any("<lambda>; the run's was partial" in line for line in said)
    record = json.loads((out / "provenance.jsonl").read_text())
    del record["Python objective"]
    (out / "provenance.jsonl").write_text(json.dumps(record) + "\n")
    assert train(config, out, resume=True, objective=partial(make), report=Said()) == 0
    assert any("objective=partial; the run's was not recorded" in line for line in said)
    said.clear()
    assert train(config, out, resume=True, report=Said()) == 0 and not any("warning" in line for line in said)
    with pytest.raises(InputError, match=r"found: partial\n *expected: that of its config.toml"):
        train(config, runs[1], resume=True, objective=partial(make))


def test_show_tells_a_run_that_is_going_on(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from minillama.runs.folder import RunFolder

    held = RunFolder(runs[1], resume=True)
    try:
        assert main(["show", str(runs[1])]) == 0
        assert f"running (process {os.getpid()})" in capsys.readouterr().out
    finally:
        held.close()
    assert main(["show", str(runs[1])]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_stopped_run_has_the_step_of_its_checkpoint(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Ctrl-C leaves it: the last step is in the checkpoint, its line comes when the run goes on."""
    stopped = shutil.copytree(runs[1], tmp_path / "c")
    shutil.rmtree(stopped / "model")
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert main(["runs", str(tmp_path)]) == 0 and "6 of 6" in capsys.readouterr().out
    assert main(["show", str(stopped)]) == 0
    assert "stopped after step 6; --resume continues at step 6" in capsys.readouterr().out


def test_what_is_no_run(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(runs[0].parent)]) == 1
    assert f"do: minillama runs {runs[0].parent}" in capsys.readouterr().err
    assert plain([{"name": "", "path": "a.txt", "weight": 2.0}, {"name": "b", "weight": 1.0}]) == "a.txt, 2 b"
    assert main(["show", str(tmp_path)]) == 1 and "not the folder of a run" in capsys.readouterr().err
    assert main(["compare", str(runs[0])]) == 1 and "nothing to compare with" in capsys.readouterr().err
    assert main(["compare", str(runs[0]), str(tmp_path / "x")]) == 1 and "no such folder" in capsys.readouterr().err


def test_a_chart_puts_each_value_in_its_place() -> None:
    text = chart({"loss": [(0, 4.0), (10, 2.0)], "val": [(5, 3.0), (6, float("nan"))]}, width=11, height=5)
    rows = text.splitlines()
    assert rows[0] == "4 |l" and rows[2] == "  |     v" and rows[4] == "2 |          l"
    assert rows[5] == "  +-----------" and rows[6].endswith("10  step; l loss, v val")
    assert chart({"loss": []}) == "no values yet"


def test_show_draws_the_curves(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = runs[0] / "loss.png"
    picture.unlink(missing_ok=True)
    assert main(["show", str(runs[0]), "--png"]) == 0
    assert capsys.readouterr().out == f"{picture}\n" and picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("minillama.runs.plot.find_spec", lambda name: None)
    assert main(["show", str(runs[0]), "--png"]) == 1
    assert "pip install 'minillama[plot]'" in capsys.readouterr().err
    again = ["train", "--out", str(runs[0]), "--resume", "--train.steps", "9"]
    assert main(again) == 0 and f"minillama show {runs[0]} --png" in capsys.readouterr().out


def test_runs_lists_all_with_their_best_figures(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(runs[0].parent), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [Path(one["run"]) for one in listed] == list(runs)
    assert main(["runs", str(runs[0].parent)]) == 0
    head, first, second = capsys.readouterr().out.strip().splitlines()
    assert "best val_loss" in head and first.split()[:2] == ["a", "finished"] and second.startswith("b")
    assert f"{listed[0]['best_val_loss']:.6g}" in first and "of 6" in second
    damaged = runs[0].parent / "c"
    damaged.mkdir()
    (damaged / "config.toml").write_text("")
    assert main(["runs", str(runs[0].parent)]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.strip().splitlines()) == 3 and "left out: this is not the folder of a run" in printed.err
    shutil.rmtree(damaged)
    for folder, found in ((tmp_path, "no runs"), (tmp_path / "none", "no such folder")):
        assert main(["runs", str(folder)]) == 1
        assert found in capsys.readouterr().err
