"""The tutorials: their commands run as they stand, and print what the pages show of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from minillama.commands.cli import main

DOCS = Path(__file__).resolve().parents[1] / "docs"
SHORT = " --train.batch_size 2 --train.context 32 --train.compile false --validate.tokens 500 --sample.max_new_tokens 4"


def read(name: str) -> str:
    return (DOCS / f"tutorial_{name}.md").read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    return [line for block in re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M) for line in block.splitlines()]


def run(command: str) -> None:
    assert main(shlex.split(command)[1:]) == 0, command


def test_what_a_model_costs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    said, checked = "", 0
    for kind, block in re.findall(r"^```(sh)?\n(.*?)^```", read("engineer"), re.S | re.M):
        if kind:
            for command in block.splitlines():
                run(command)
            said = capsys.readouterr().out
            continue
        for line in block.splitlines():
            assert line.rstrip() in {shown.rstrip() for shown in said.splitlines()}, line
            checked += bool(line)
    assert checked > 30


@pytest.mark.slow
def test_experiments_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page, namespace = read("researcher"), {"__name__": "example"}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M):  # one after the other, as they stand
        exec(compile(block, "docs/tutorial_researcher.md", "exec"), namespace)
    said = capsys.readouterr().out
    assert re.search(r"layer 3: '.*'", said) and float(re.findall(r"([\d.]+) nats per token", said)[-1]) < 7.6
    assert '"loss_ahead"' in Path("runs/ahead/metrics.jsonl").read_text()
    for command in commands(page):
        run(command)


@pytest.mark.slow
def test_ones_own_text_in_ten_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With settings that keep the runs short."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mytext").mkdir()
    (tmp_path / "mytext/novel.txt").write_text("\n".join(f"Alice looked at wave {i * i % 97}." for i in range(4000)))
    for command in commands(read("student")):
        command = re.sub(r"--train.steps (\d)00", r"--train.steps \1", command)
        is_new = command.startswith("minillama train") and "--resume" not in command
        run(command + SHORT * is_new)
        assert "".join(capsys.readouterr()).strip(), command
    assert (tmp_path / "mine.gguf").is_file()
