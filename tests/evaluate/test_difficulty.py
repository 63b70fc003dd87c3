"""Grades of difficulty by a teacher: expected grade, conversations that are not graded, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.evaluate.difficulty import GRADES, teacher_grades
from minillama.model import Decoder
from minillama.synthetic.wording import wording
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.template import load_template
from minillama.tokenizer.train import byte_tokenizer


class Fixed:
    """Teacher of given probabilities, which notes what it was asked."""

    about: Mapping[str, Any] = {}

    def __init__(self, *shares: Sequence[float]) -> None:
        self.shares, self.asked = shares, list[str]()

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("grades come from probabilities")

    def option_logprobs(self, prompts: Sequence[Any], options: Sequence[str]) -> list[list[float]]:
        assert tuple(options) == GRADES == ("1", "2", "3", "4", "5")
        self.asked += [prompt[0]["content"] for prompt in prompts]
        return [[math.log(share) if share else -math.inf for share in row] for row in self.shares]


def test_the_grade_is_the_mean_over_the_digits_probabilities() -> None:
    talk = Conversation.of([{"role": "user", "content": "Six times {seven}?"}, {"role": "assistant", "content": "42"}])
    teacher = Fixed([0.1, 0, 0, 0, 0.3], [0, 0, 1e-9, 0, 0], [0] * 5)
    # (0.1 * 1 + 0.3 * 5) / 0.4; a grade that alone has a probability; none at all
    assert teacher_grades(teacher, [talk] * 3, wording("en")["grade"]) == [pytest.approx(4.0), 3.0, None]
    assert all("Six times {seven}?" in text and "assistant: 42" in text for text in teacher.asked)


def test_the_command_writes_the_teachers_grades(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=48, vocab_size=257, max_seq_len=512)
    model, tokenizer = Decoder(shape), byte_tokenizer()
    model.init_weights(torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path / "model")
    tokenizer.with_chat_template(load_template("plain", tokenizer).source).save(tmp_path / "model")
    lines = [{"prompt": f"Say {i}", "response": str(i) * (1 + 600 * (i == 3))} for i in range(5)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["data", "difficulty", str(tmp_path / "all.jsonl"), "--buckets", "2", "--output", str(tmp_path / "out")]
    assert main([*words, "--teacher", "a", "--model", "b"]) == 1
    assert "found: both" in capsys.readouterr().err
    words += ["--teacher", str(tmp_path / "model")]
    assert main(words) == 1  # one record is too long for the teacher
    assert "all.jsonl:4" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*words, "--on-error", "skip"]) == 0
    out, err = capsys.readouterr()
    assert "1 document left out" in err and "of 1 to 5" in out
    read = [json.loads(line) for n in (1, 2) for line in (tmp_path / f"out/bucket-{n}.jsonl").open()]
    assert sorted(record["prompt"] for record in read) == [f"Say {i}" for i in (0, 1, 2, 4)]
    text = wording("en")["grade"].format(conversation=f"user: {read[0]['prompt']}\n\nassistant: {read[0]['response']}")
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(text)]))[0, -1, [ord(digit) for digit in "12345"]]
    expected = (logits.softmax(-1) * torch.arange(1, 6)).sum().item()
    assert read[0]["difficulty"] == pytest.approx(expected, abs=1e-3)
