"""Prompts of conversations: what precedes the last answer, the split of fine-tuning, records without an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillama.data.prompts import Prompts
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.tokenizer.template import load_template
from minillama.tokenizer.train import byte_tokenizer

TURNS = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]
RECORDS: list[dict[str, Any]] = [
    {"prompt": "Sort 3 1 2.", "response": "1 2 3", "level": 2},
    {"prompt": "Only a question?"},
    {"prompt": [{"role": "user", "content": "A list?"}]},
    {"instruction": "Name a bird.", "input": "in Dutch"},
    {"messages": [*TURNS, {"role": "user", "content": "Two?"}]},
    {"conversations": [{"from": "human", "value": "Which?"}], "chosen": {"from": "gpt", "value": "This."}},
    {"prompt": "Preferred?", "chosen": "Yes.", "rejected": "No."},
]


def load(path: Path, fraction: float = 0.5, longest: int = 400, template: str = "vicuna") -> Prompts:
    tokenizer = byte_tokenizer()
    return Prompts.load([Source(path=str(path))], load_template(template, tokenizer), tokenizer, longest, fraction)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_records_with_and_without_answers(file: Path) -> None:
    data = load(file)
    found = {prompt.where.rpartition(":")[2]: prompt for prompt in (*data.train, *data.val)}
    assert len(found) == len(RECORDS) and data.end_id == byte_tokenizer().eos_id
    assert found["1"].record["answer"] == "1 2 3" and found["1"].record["level"] == 2
    assert all("answer" not in found[n].record for n in "2345 67".replace(" ", ""))
    assert found["1"].text.endswith("USER: Sort 3 1 2. ASSISTANT:")
    assert found["5"].text.endswith("USER: One? ASSISTANT: 1USER: Two? ASSISTANT:")
    assert "in Dutch" in found["4"].text and "Which? ASSISTANT:" in found["6"].text
    assert [m.content for m in found["5"].conversation.messages] == ["One?", "1", "Two?"]


def test_the_split_is_that_of_fine_tuning() -> None:
    """What a model has not seen in fine-tuning on a task is what it is examined on here."""
    from minillama.runs.config import RunConfig, load_run_config
    from minillama.runs.report import make_report
    from minillama.training.data import load_data

    words = ["--data.sources", "sorting:2", "--data.template", "plain", "--data.val_fraction", "0.3"]
    config: RunConfig = load_run_config("tiny", words)
    data, _ = load_data(config, byte_tokenizer(), make_report())
    tokenizer = byte_tokenizer()
    prompts = Prompts.load([Source("sorting:2")], load_template("plain", tokenizer), tokenizer, 100, 0.3)
    held_out = [example.ids[: len(example.prompt)].tolist() for example in data.val]  # type: ignore[union-attr]
    assert held_out == [prompt.ids for prompt in prompts.val] and 20 < len(held_out) < 40
    assert all(prompt.record["answer"] == "".join(sorted(prompt.record["prompt"][:2])) for prompt in prompts.val)


def test_an_epoch_asks_every_question_once() -> None:
    tokenizer = byte_tokenizer()
    data = Prompts.load([Source("arithmetic:1")], load_template("plain", tokenizer), tokenizer, 9, 0.2)
    size = len(data.train)
    asked = [prompt.text for step in range(size) for prompt in data.batch(1, step, 2)]
    assert len(asked) == 2 * size and set(asked[:size]) == set(asked[size:]) and asked[:size] != asked[size:]
    assert [p.text for p in data.batch(1, 3, 2)] == asked[6:8] != [p.text for p in data.batch(2, 3, 2)]


def test_long_prompts_are_left_out_and_none_is_an_error(file: Path) -> None:
    data = load(file, longest=190)
    assert data.skipped.counts["too long"] == 2 and len(data.train) + len(data.val) == len(RECORDS) - 2
    with pytest.raises(InputError, match=r"too few prompts[\s\S]*of at most 5 tokens"):
        load(file, longest=5)


def test_a_question_is_held_out_of_fine_tuning_preferences_and_rollouts_alike(tmp_path: Path) -> None:
    """Whatever its answers, what follows, and how the template writes it."""
    from minillama.data import preference_set
    from minillama.runs.config import RunConfig, load_run_config
    from minillama.runs.report import make_report
    from minillama.training.data import load_data

    tokenizer, file = byte_tokenizer(), tmp_path / "both.jsonl"
    red = {"role": "assistant", "content": "Red."}
    turns = [[{"role": "user", "content": f"Name color {i}."}, red] for i in range(40)]
    later = [{"role": "user", "content": "Another?"}, {"role": "assistant", "content": "Blue."}]
    file.write_text("".join(json.dumps({"messages": [*t, *later], "rejected": "Dog."}) + "\n" for t in turns))
    words = ["--data.sources", str(file), "--data.template", "plain", "--data.val_fraction", "0.3"]
    config: RunConfig = load_run_config("tiny", words)
    tuned = load_data(config, tokenizer, make_report())[0].val  # type: ignore[union-attr]
    vicuna = load_template("vicuna", tokenizer)
    compared = preference_set.load([Source(path=str(file))], vicuna, tokenizer, 400, 0.3).val
    asked = load(file, 0.3).val
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(json.dumps({"prompt": t[0]["content"]}) + "\n" for t in turns))
    first = load(alone, 0.3, template="plain").val
    lines = [{part.where.rpartition(":")[2] for part in found} for found in (tuned, compared, asked, first)]
    assert lines[0] == lines[1] == lines[2] == lines[3] and 4 < len(lines[0]) < 25
