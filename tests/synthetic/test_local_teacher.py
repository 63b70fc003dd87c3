"""A local model as the teacher: the commands, batches, prompts that do not fit, and kill -9."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.data.conversations import conversations
from minillama.data.preferences import preferences
from minillama.data.sources import Source
from minillama.inference.load import ModelArgs
from minillama.inference.remote import Local
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.tokenizer.template import load_template
from minillama.tokenizer.train import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that writes letters, and questions."""
    path = tmp_path_factory.mktemp("model")
    shape = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=257, max_seq_len=1024)
    model = Decoder(shape)
    model.init_weights(torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.output_weight.zero_()[97:123].normal_(0, 1.3, generator=torch.Generator().manual_seed(2))
        model.output_weight[65:67] = 0.01  # A and B may be chosen too
    model.save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.with_chat_template(load_template("plain", tokenizer).source).save(path)
    lines = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(6)]
    (path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(folder: Path, out: Path, command: str, *words: str) -> list[str]:
    source = [] if words[:1] == ("--from",) else [str(folder / "q.jsonl")]
    words = words[1:] if not source else words
    more = ["--teacher", str(folder), "--max-new-tokens", "5", "--output", str(out)]
    assert main(["data", command, *source, *words, *more]) == 0
    return out.read_text().splitlines()


def test_completions_are_those_of_generate_whatever_the_batch(folder: Path) -> None:
    teacher = Local(*ModelArgs(str(folder)).load(), "m")
    prompts = [f"{i}" * (i + 1) for i in range(5)]
    whole = teacher(prompts, 6, Sampling(1.0, seed=4))
    assert [one.text for i in range(5) for one in teacher(prompts[i : i + 1], 6, Sampling(1.0, seed=4 + i))] == [
        one.text for one in whole
    ]
    long = teacher([prompts[0], "x" * 2000, prompts[2]], 6, Sampling(1.0, seed=4))
    assert [one.text for one in long] == [whole[0].text, "", whole[2].text] and long[1].reason == "context"
    asked = [[{"role": "user", "content": "Which?"}], [{"role": "user", "content": "x" * 2000}]]
    first, second = teacher.option_logprobs(asked, ("A", "B"))
    assert first[0] == pytest.approx(first[1], abs=1e-4) and max(first) < 0 and second == [-math.inf] * 2


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    revised = run(folder, tmp_path / "a.jsonl", "constitutional", "--rounds", "1")
    assert len(revised) == 6 and len(list(conversations(Source(path=str(tmp_path / "a.jsonl"))))) == 6
    run(folder, tmp_path / "b.jsonl", "constitutional", "--from", str(tmp_path / "a.jsonl"), "--step", "compare")
    counts = json.loads((tmp_path / "b.jsonl.provenance.json").read_text())["counts"]
    found = list(preferences(Source(path=str(tmp_path / "b.jsonl")))) if counts["lines"] else []
    assert len(found) == counts["lines"] == 6 - counts.get("undecided", 0)
    ghosts = run(folder, tmp_path / "c.jsonl", "ghost-attention", "--concurrency", "2")
    assert len(ghosts) == 6
    assert run(folder, tmp_path / "d.jsonl", "ghost-attention", "--concurrency", "5") == ghosts


def test_a_base_model_takes_a_template_which_provenance_has(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Decoder.from_pretrained(folder).save_pretrained(tmp_path / "base")
    byte_tokenizer().save(tmp_path / "base")
    out = tmp_path / "a.jsonl"
    words = ["data", "ghost-attention", str(folder / "q.jsonl"), "--max-new-tokens", "5", "--output", str(out)]
    remote, words = [*words, "--teacher", "http://127.0.0.1:9"], [*words, "--teacher", str(tmp_path / "base")]
    assert main(words) == 1 and "--template" in capsys.readouterr().err
    assert main([*words, "--template", "plain"]) == 0
    about = json.loads((tmp_path / "a.jsonl.provenance.json").read_text())["about"]
    assert about["teacher"]["template"] == Local(*ModelArgs(str(folder)).load()).about["template"] and about["wording"]
    assert about["quantize"] == "auto"
    assert main([*words, "--template", "vicuna"]) == 1
    assert "begun with another teacher" in capsys.readouterr().err
    assert main([*words, "--template", "plain", "--dtype", "bfloat16"]) == 1
    assert "begun with another teacher" in capsys.readouterr().err
    model = Decoder.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.output_weight.neg_()
    model.save_pretrained(tmp_path / "base")  # another model of this name
    assert main([*words, "--template", "plain"]) == 1
    assert "begun with another teacher" in capsys.readouterr().err
    assert main([*remote, "--template", "plain"]) == 1
    assert "template of its own" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_loses_and_doubles_no_line(folder: Path, tmp_path: Path) -> None:
    whole = run(folder, tmp_path / "whole.jsonl", "ghost-attention", "--concurrency", "1")
    out = tmp_path / "cut.jsonl"
    command = ["data", "ghost-attention", str(folder / "q.jsonl"), "--teacher", str(folder), "--max-new-tokens", "5"]
    for lines in (1, 3):
        words = [sys.executable, "-m", "minillama", *command, "--concurrency", "1", "--output", str(out)]
        with subprocess.Popen(words) as process:
            while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= lines):
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert run(folder, out, "ghost-attention", "--concurrency", "1") == whole
