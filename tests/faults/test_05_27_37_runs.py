"""Faults that a run must refuse before step 0, leaving what was there as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillama.commands.cli import main
from minillama.tokenizer import train_byte_bpe


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_fault_05_tokenizer_larger_than_the_model(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_byte_bpe(["a tide is a tide is a tide " * 9, "the the the then there " * 9], 290).save(tmp_path / "tokenizer")
    out = tmp_path / "run"
    options = ["--tokenizer.path", str(tmp_path / "tokenizer"), "--model.vocab_size", "200", "--out", str(out)]
    assert main([*words, *options]) == 1
    error = capsys.readouterr().err
    assert "the tokenizer is larger than the model's vocabulary" in error
    assert "a model of 200" in error and "--model.vocab_size 2" in error
    assert not (out / "metrics.jsonl").exists()


def test_fault_07_text_shorter_than_the_context(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("Too short.", encoding="utf-8")
    assert main([*words, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "tokens" in error and "at least 17" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.skipif(os.name == "nt", reason="mounts and permissions are those of Unix")
def test_fault_27_read_only_output_folder(words: list[str], tmp_path: Path) -> None:
    place = tmp_path / "readonly"
    place.mkdir()
    command = [sys.executable, "-m", "minillama", *words, "--out", str(place / "run")]
    if os.geteuid() == 0:  # root writes whatever the permissions, but not to a mount that is read-only
        script = 'mount -t tmpfs -o ro none "$0" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", script, str(place), *command]
    else:
        place.chmod(0o555)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "the output folder cannot be written" in result.stderr and "Traceback" not in result.stderr
    assert "--out" in result.stderr and "step 0" not in result.stdout
    assert list(place.iterdir()) == []


def test_fault_37_output_folder_holds_a_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*words, "--out", str(out)]) == 0
    before = snapshot(out)
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    capsys.readouterr()
    assert main([*words, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "holds a run already" in error and "--resume" in error and "--overwrite" in error
    assert {name: data for name, data in snapshot(out).items() if name != "notes.txt"} == before

    assert main([*words, "--out", str(out), "--seed", "9", "--overwrite"]) == 0
    after = snapshot(out)
    assert after["model/model.safetensors"] != before["model/model.safetensors"]
    assert after["notes.txt"] == b"mine"


def test_fault_38_two_runs_in_one_folder(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from minillama.runs.folder import RunFolder

    held = RunFolder(tmp_path / "run")
    try:
        assert main([*words, "--out", str(tmp_path / "run")]) == 1
        assert f"process {os.getpid()}" in capsys.readouterr().err
    finally:
        held.close()
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    held = RunFolder(tmp_path / "run", resume=True)
    try:
        assert main([*words, "--out", str(tmp_path / "run"), "--resume"]) == 1
    finally:
        held.close()
    assert main([*words, "--out", str(tmp_path / "run"), "--resume"]) == 0


def test_default_folders_are_numbered(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(words) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]


def test_a_run_that_never_began_leaves_no_folder(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Too short.", encoding="utf-8")
    assert main([*words, "--out", str(tmp_path / "run")]) == 1
    assert not (tmp_path / "run").exists()


def test_a_mistyped_folder_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path / "rum"), "--resume"]) == 1
    assert "there is no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "rum").exists()
