"""Links, pipes and devices inside a run folder, names that lead out of it, and a run that was killed at once."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama import Decoder, ModelConfig
from minillama.commands.cli import main
from minillama.data.cleaning.inputs import Input
from minillama.data.cleaning.pipeline import Pipeline
from minillama.data.cleaning.report import write_report
from minillama.data.cleaning.run import Cleaning
from minillama.data.cleaning.tally import Tally
from minillama.errors import InputError
from minillama.evaluate.multiple_choice import Outcome
from minillama.evaluate.results import ResultFolder
from minillama.files import replace_folder
from minillama.runs import provenance
from minillama.runs.checkpoint import prune, steps
from minillama.runs.config import RunConfig, load_run_config
from minillama.runs.folder import RunFolder, append_line
from minillama.synthetic.writer import Generated
from minillama.tokenizer import byte_tokenizer
from minillama.tokenizer.compare import Figures, plot

FILES = (".lock", "metrics.jsonl", "provenance.jsonl", "loss.png", "config.toml")
FOLDERS = ("checkpoints", "model")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_bytes(b"mine")
    return folder


def unharmed(outside: Path) -> bool:
    return [path.name for path in outside.iterdir()] == ["file"] and (outside / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_fault_39_a_link_in_a_run_folder(tmp_path: Path, outside: Path, name: str) -> None:
    link = tmp_path / "run" / name
    link.parent.mkdir()
    link.symlink_to(outside if name in FOLDERS else outside / "file")
    with pytest.raises(InputError, match="not a link") as error:
        RunFolder(link.parent, resume=True)
    assert error.value.where == link and error.value.fix == "remove it"
    if name != ".lock":
        folder = RunFolder(link.parent, overwrite=True)
        folder.start("", {})
        assert not link.is_symlink()
        folder.close()
    assert unharmed(outside)


def test_fault_39_what_a_run_writes_leads_nowhere(words: list[str], tmp_path: Path, outside: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    names = (".write-test", ".loss.png.tmp", ".config.toml.tmp", ".metrics.jsonl.tmp", ".model.tmp", ".model.old")
    for name in names:
        (run / name).symlink_to(outside if name.startswith(".model") else outside / "file")
    assert main([*words, "--out", str(run)]) == 0
    assert unharmed(outside) and (run / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_fault_39_a_pipe_or_a_folder_for_a_file(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / name)
    with pytest.raises(InputError, match="a regular file"):
        RunFolder(tmp_path, resume=True)


def test_fault_39_no_line_is_added_behind_a_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(outside / "file")
    with pytest.raises(InputError, match="cannot write"):
        append_line(tmp_path / "metrics.jsonl", {"step": 1})
    assert unharmed(outside)


@pytest.mark.parametrize("name", ["model", ".model.tmp", ".model.old"])
def test_fault_39_a_folder_replaces_a_link(tmp_path: Path, outside: Path, name: str) -> None:
    (tmp_path / name).symlink_to(outside)
    replace_folder(tmp_path / "model", lambda folder: (folder / "new").write_bytes(b""))
    assert unharmed(outside) and not (tmp_path / "model").is_symlink()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


OUTCOME = Outcome("t", "1", "p", "s", 0, [0.0], [1], [1], [0.0])
WRITTEN: dict[str, Callable[[Path], object]] = {
    "model.safetensors": lambda folder: model().save_pretrained(folder),
    "config.json": lambda folder: model().save_pretrained(folder),
    "generation_config.json": lambda folder: model().save_pretrained(folder),
    "model.safetensors.index.json": lambda folder: model().save_pretrained(folder, max_shard_size="4KB"),
    "tokenizer.json": lambda folder: byte_tokenizer().save(folder),
    "tokenizer_config.json": lambda folder: byte_tokenizer().save(folder),
    "plot.png": lambda folder: plot(folder / "plot.png", {"a": {"b": Figures(1, None, 1, 1, 0, 1)}}),
    "report.html": lambda folder: write_report(folder / "report.html", Pipeline("x"), Tally(), {}),
}
APPENDED: dict[str, Callable[[Path], object]] = {
    "items.jsonl": lambda folder: ResultFolder(folder, {}).add(OUTCOME),
    "out.jsonl": lambda folder: Generated(folder / "out.jsonl", {}).commit([{"a": 1}], 1, {}),
}


def model() -> Decoder:
    config = ModelConfig(dim=16, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=16, vocab_size=257, max_seq_len=16)
    made = Decoder(config)
    made.stop_ids = frozenset({256})
    return made


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("name", [*WRITTEN, *APPENDED])
def test_fault_39_whatever_is_written_leads_nowhere(name: str, is_there: bool, tmp_path: Path, outside: Path) -> None:
    """What is written as a whole replaces a link, as in a snapshot of the hub's cache; none is appended to."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).symlink_to(outside / ("file" if is_there else "absent"))
    if name in WRITTEN:
        WRITTEN[name](folder)
        assert (folder / name).is_file() and not (folder / name).is_symlink()
    else:
        with pytest.raises(InputError):
            APPENDED[name](folder)
    assert unharmed(outside)


def test_fault_39_no_generated_file_is_cut_through_a_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "out.jsonl").symlink_to(outside / "file")
    state = {"about": {"inputs": {}}, "minillama": "", "done": 0, "bytes": 0, "counts": {}}
    (tmp_path / "out.jsonl.provenance.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(InputError, match="cannot write"):
        Generated(tmp_path / "out.jsonl", {})
    assert unharmed(outside)
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.provenance.json").write_text(json.dumps({"about": []}), encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        Generated(tmp_path / "out.jsonl", {})


def test_fault_39_a_cleaning_goes_on_in_its_own_folder(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "a.txt").write_text("Some text of a source.\n", encoding="utf-8")
    pipeline = Pipeline("x", sources=(Input(str(tmp_path / "a.txt")),))
    output = tmp_path / "out"
    Cleaning(pipeline, output).start()
    (output / "removed").symlink_to(outside)
    with pytest.raises(InputError, match="not a cleaning's own"):
        Cleaning(pipeline, output).run()
    (tmp_path / "link").symlink_to(output)
    words = ["data", "clean", str(tmp_path / "a.txt"), "--output", str(tmp_path / "link"), "--overwrite"]
    assert main([*words, "--workers", "1"]) == 0
    assert (output / "cleaned.json").is_file() and unharmed(outside)


def test_fault_39_parts_of_a_checkpoint_are_not_written_through_a_link(tmp_path: Path, outside: Path) -> None:
    for name in (".parts-3", ".step-2.tmp", ".step-1.old"):
        (tmp_path / name).symlink_to(outside)
    prune(tmp_path, 1)
    assert not list(tmp_path.glob(".*")) and unharmed(outside)


def test_fault_39_full_width_digits_are_no_step(tmp_path: Path) -> None:
    for name in ("step-７０", "step-007", "step-8"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}", encoding="utf-8")
    assert steps(tmp_path) == [8]


def test_fault_39_provenance_does_not_write_to_a_checkout(tmp_path: Path) -> None:
    """`git status` refreshes the index of files whose times have changed, and leaves its lock if it is killed."""
    (tmp_path / "__init__.py").write_text("")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    os.utime(tmp_path / "__init__.py", (1, 1))
    before = (tmp_path / ".git/index").read_bytes()
    found = provenance._git(tmp_path)
    assert found is not None and found["changed"] == []
    assert (tmp_path / ".git/index").read_bytes() == before


NAMES = ("../x", "/x", "a/b", "", " ", "..", ".x", "a\nb", "a\x1b[2J", "a\\b", "x" * 201, "中" * 67)


@pytest.mark.parametrize("name", NAMES)
def test_fault_40_names_of_runs_stay_inside_runs(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name of a run"):
        RunConfig(name=name)
    file = tmp_path / "c.toml"
    file.write_text(f"\nname = {json.dumps(name)}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"c.toml:2, name"):
        load_run_config(str(file))


def test_fault_40_an_output_path_that_is_too_long(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--out", "x" * 300]) == 1
    assert "the output folder cannot be written" in capsys.readouterr().err


def test_fault_50_a_run_killed_before_its_first_write_is_resumed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a loop that gives --resume from the start, whatever a process that was killed has left."""
    files = {
        ".lock": b"1",
        ".config.toml.tmp": b"[tr",
        "provenance.jsonl": b'{"seed"',
        "checkpoints/.step-1.tmp/a": b"",
    }
    for count, name in enumerate(["", *files, "config.toml"]):
        out = tmp_path / str(count)
        for left, data in list(files.items())[:count]:
            (out / left).parent.mkdir(parents=True, exist_ok=True)
            (out / left).write_bytes(data)
        if name == "config.toml":
            (out / name).write_bytes((tmp_path / "0" / name).read_bytes())
        assert main([*words, "--out", str(out), "--resume"]) == 0
        assert "starting at step 0" in capsys.readouterr().out
        assert main(["train", "--out", str(out), "--resume"]) == 0
        assert "is finished: 2 of 2 steps" in capsys.readouterr().out
