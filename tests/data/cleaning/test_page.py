"""The page on data: its commands, from a crawl to a run, as they stand."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from glob import glob
from pathlib import Path

import pytest

from minillama.commands.cli import main

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"
SHORT = " --train.steps 1 --train.batch_size 2 --train.context 32 --validate.tokens 500 --train.compile false"


@pytest.mark.slow
def test_from_a_crawl_to_a_run(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINILLAMA_CACHE", str(tmp_path / "cache"))
    for name in ("crawl", "checkouts"):
        (tmp_path / name).mkdir()
    shutil.copy(shared / "web/warc/sample-0000.warc.gz", "crawl")
    Path("checkouts/a.py").write_text("def f(x):\n    return x + 1\n" * 50)
    lines = (shared / "text/en/c4_demo.jsonl").read_text(encoding="utf-8").splitlines()[:80]
    Path("wiki.jsonl").write_text("\n".join(lines))
    section = PAGE.read_text(encoding="utf-8").partition("## A corpus, step by step")[2].partition("\n## ")[0]
    for name, text in re.findall(r"`(\w+\.toml)`:\n\n *```toml\n(.*?)```", section, re.S):
        Path(name).write_text(text)
    for block in re.findall(r"```sh\n(.*?)```", section, re.S):
        for command in block.strip().splitlines():
            words = shlex.split(command + (SHORT if "train.py" in command else ""))
            words = [name for word in words for name in (sorted(glob(word)) if "*" in word else [word])]
            assert main(["train", *words[2:]] if words[0] == "python" else words[1:]) == 0, command
    made = json.loads(Path("runs/mixture/provenance.jsonl").read_text())["cleaned"]
    assert [cleaning["pipeline"] for cleaning in made.values()] == ["joined", "joined", "code"]
