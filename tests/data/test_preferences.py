"""Preferences in the forms that people have, their tokens, and what is cut, left out or refused."""

from __future__ import annotations

import ast
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from minillama.data.preference_set import Judged, Preferences, collate, encode_answer, fitted, load
from minillama.data.preferences import preferences, read_preference
from minillama.data.python_qa import HOW, WHAT, WHERE, _conversation, _public, _turns, first_sentence, python_qa
from minillama.data.reading import Record
from minillama.data.skipped import BadText, Skipped
from minillama.data.sources import Source, records
from minillama.data.tasks import is_right
from minillama.errors import InputError
from minillama.tokenizer import Tokenizer, TokenizerTrainer
from minillama.tokenizer.template import load_template

HUMAN = "\n\nHuman: Name a color.\n\nAssistant:"
USER = [{"role": "user", "content": "Name a color."}]


def message(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


PAIRS: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "Name a color.", "chosen": "Red.", "rejected": "Seven."},
    "question": {"question": "Name a color.", "chosen": "Red.", "rejected": "Seven."},
    "alpaca": {"instruction": "Name a color.", "input": "", "chosen": "Red.", "rejected": "Seven."},
    "dialogues": {"chosen": f"{HUMAN} Red.", "rejected": f"{HUMAN} Seven."},
    "prompt of a dialogue": {"prompt": HUMAN, "chosen": " Red.", "rejected": " Seven."},
    "messages": {"prompt": USER, "chosen": [message("Red.")], "rejected": [message("Seven.")]},
    "messages, prompt inside": {"chosen": [*USER, message("Red.")], "rejected": [*USER, message("Seven.")]},
    "messages, prompt twice": {
        "prompt": "Name a color.",
        "chosen": [*USER, message("Red.")],
        "rejected": [*USER, message("Seven.")],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Name a color."}],
        "chosen": {"from": "gpt", "value": "Red."},
        "rejected": {"from": "gpt", "value": "Seven."},
    },
    "sharegpt, strings": {
        "conversations": [{"from": "human", "value": "Name a color."}],
        "chosen": "Red.",
        "rejected": "Seven.",
    },
    "two lists": {"chosen_messages": [*USER, message("Red.")], "rejected_messages": [*USER, message("Seven.")]},
    "question and answer": {"prompt": "Name a color.", "response": "Red.", "rejected": "Seven."},
    "conversation": {"messages": [*USER, message("Red.")], "rejected": "Seven."},
}
LABELED: dict[str, dict[str, Any]] = {
    "messages": {"messages": [*USER, message("Red.")], "label": True},
    "strings": {"prompt": "Name a color.", "completion": "Red.", "label": False},
    "alpaca": {"instruction": "Name a color.", "output": "Red.", "kto_tag": 1},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = ["Name a color. Red. Seven. Human Assistant user assistant\n" * 20]
    return TokenizerTrainer("byte-bpe", 300)(text).with_special(("<|im_start|>", "<|im_end|>"))


@pytest.mark.parametrize("fields", PAIRS.values(), ids=PAIRS)
def test_every_form_of_a_pair_is_the_same_conversation_twice(fields: dict[str, Any]) -> None:
    found = read_preference(Record({**fields, "margin": 0.5, "probability": 0.8}, "here"))
    assert found.chosen is not None and found.rejected is not None
    assert (found.margin, found.probability) == (0.5, 0.8)
    for side, answer in ((found.chosen, "Red."), (found.rejected, "Seven.")):
        assert [(m.role, m.content) for m in side.messages] == [("user", "Name a color."), ("assistant", answer)]


@pytest.mark.parametrize("fields", LABELED.values(), ids=LABELED)
def test_every_form_of_a_judged_answer(fields: dict[str, Any]) -> None:
    found = read_preference(Record(fields, "here"))
    good = found.chosen is not None
    assert good == bool(fields.get("label", fields.get("kto_tag"))) and len(found.sides) == 1
    assert found.sides[0].messages[-1].content == "Red."


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "p", "completion": "c"}, "not a record of preferences"),
        ({"prompt": "p", "completion": "c", "label": "yes"}, "not a record of preferences"),
        ({"prompt": "p", "chosen": 3, "rejected": "r"}, "'chosen' is no answer"),
        ({"chosen": "p", "rejected": "r"}, "no prompt, and not a dialogue"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "large"}, "margin is not a number"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": float("nan")}, "margin is not a number"),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "probability": 0.4},
            "the chosen answer is the less probable one",
        ),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "probability": 1.5},
            "probability is not a number between 0 and 1",
        ),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "probability": "0.5"},
            "probability is not a number between 0 and 1",
        ),
        ({"conversations": "p", "chosen": "c", "rejected": "r"}, "not a list of messages"),
        ({"chosen": [*USER, message("c")], "rejected": [message("Other?", "user"), message("r")]}, "answer the same"),
        ({"chosen_messages": USER, "rejected_messages": USER}, "nothing in it is of the assistant"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "answer is empty"),
    ],
)
def test_what_is_no_preference_is_refused_by_file_and_record(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{json.dumps(PAIRS['strings'])}\n{json.dumps(fields)}\n")
    with pytest.raises(BadText, match=said) as error:
        list(preferences(Source(path=str(file))))
    assert str(error.value.where).endswith("pairs.jsonl:2")
    skipped = Skipped()
    assert len(list(preferences(Source(path=str(file)), "skip", skipped))) == 1 and skipped.total == 1


@pytest.mark.parametrize("template", ["chatml", "vicuna", "alpaca", "plain"])
def test_both_answers_follow_the_same_prompt_and_end(template: str, tokenizer: Tokenizer) -> None:
    rules = load_template(template, tokenizer)
    found = read_preference(Record(PAIRS["strings"], "here"))
    first, second = (encode_answer(side, rules, tokenizer) for side in found.sides)
    assert first.prompt == second.prompt and first.text == second.text and "Name a color." in first.text
    end = tokenizer.backend.token_to_id("<|im_end|>") if template == "chatml" else tokenizer.eos_id
    for side, text in ((first, "Red."), (second, "Seven.")):
        assert side.answer[-1] == end and tokenizer.decode(side.answer).strip() == text
        assert side.prompt.count(tokenizer.bos_id) <= 1 and end not in side.answer[:-1]


def test_the_prompt_loses_its_beginning_and_then_the_answers_their_end() -> None:
    prompt, answers = [9, *range(10, 19)], [[1, 2, 3, 0], [4, 5, 0]]
    assert fitted(prompt, answers, 14, 9) == (prompt, answers)
    assert fitted(prompt, answers, 10, 9) == ([9, 14, 15, 16, 17, 18], answers)
    assert fitted(prompt, answers, 6, 9) == ([9, 17, 18], [[1, 2, 3], [4, 5, 0]])  # the end token of the first goes
    assert fitted(prompt, answers, 6) == ([16, 17, 18], [[1, 2, 3], [4, 5, 0]])


def test_texts_are_padded_behind() -> None:
    rows = [Judged.of([1, 2], [[3], [4, 5, 6]], 0), Judged.of([7], [[8, 9], [1]], 0)]
    texts = collate(rows)
    assert texts.ids.shape == (2, 2, 32) and collate(rows, 8).ids.shape == (2, 2, 8)
    assert texts.ids[0, 1, :6].tolist() == [1, 2, 4, 5, 6, 0] and texts.ids[1, 0, :4].tolist() == [7, 8, 9, 0]
    assert texts.lengths.tolist() == [[3, 5], [3, 2]] and texts.answers.tolist() == [[1, 3], [2, 1]]


def test_a_data_set_is_split_by_prompt_and_says_what_it_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{**PAIRS["strings"], "prompt": f"Name color {i // 3}.", "margin": i % 2} for i in range(150)]
    records[9] |= {"probability": 0.75}
    records[7] |= {"rejected": "Red."}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    sources, rules = [Source(path=str(file))], load_template("plain", tokenizer)
    data = load(sources, rules, tokenizer, 64, 0.3)
    prompts = [{bytes(row.prompt) for row in split} for split in (data.train, data.val)]
    assert len(data.train) + len(data.val) == 149 and not prompts[0] & prompts[1]
    assert "1 pairs of equal answers left out" in str(data.skipped) and {row.label for row in data.train} == {0.0, 1.0}
    assert [row.probability for row in (*data.train, *data.val) if row.where.endswith(":10")] == [0.75]
    order = [data.chosen(3, step, 5) for step in range(2 * len(data.train) // 5)]
    flat = [i for part in order for i in part]
    assert sorted(flat[: len(data.train)]) == list(range(len(data.train))) and flat != sorted(flat)
    assert data.where(3, 1, 5, [2]) == [data.train[order[1][2]].where]
    single = load(sources, rules, tokenizer, 64, 0.3, pairs=False)
    assert len(single.train) + len(single.val) == 298 and sum(row.label for row in single.train) * 2 == len(
        single.train
    )
    short = load(sources, rules, tokenizer, 10, 0.3)
    assert max(row.longest for row in short.train) == 10 and "truncated" in str(short.skipped)
    assert len({d.fingerprint for d in (data, single, short)}) == 3
    with pytest.raises(InputError, match="judged alone is no pair"):
        file.write_text(json.dumps(LABELED["strings"]))
        load(sources, rules, tokenizer, 64, 0.3)
    with pytest.raises(InputError, match="too few preferences"):
        Preferences.of([], [], 8)


def test_files_of_llama_factory(shared: Path) -> None:
    for name, count, sides in (
        ("dpo_en_demo.json", 300, 2),
        ("dpo_zh_demo.json", 300, 2),
        ("kto_en_demo.json", 300, 1),
        ("v1_dpo_demo.jsonl", 10, 2),
    ):
        found = list(preferences(Source(path=str(shared / "pref" / name))))
        assert len(found) == count and all(len(preference.sides) == sides for preference in found)


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic:1", "sorting:3", "spelling"])
def test_tasks_have_a_near_miss_as_the_rejected_answer(name: str) -> None:
    found = [(record.value["response"], record.value["rejected"]) for record in records(Source(name))]
    assert all(not is_right(rejected, right) and len(rejected) == len(right) for right, rejected in found)
    assert {sum(a != b for a, b in zip(*pair, strict=True)) for pair in found} == {1}
    assert len(list(preferences(Source(name)))) == len(found)


def test_python_qa_on_a_worked_example() -> None:
    source = (
        "class Queue:\n"
        '    """A queue, e.g. of jobs. It is first in, first out."""\n'
        "    def get(self, block=True, timeout: float | None = None):\n"
        '        """Remove and return an item\n        from the queue.\n\n        More."""\n'
        "def short():\n"
        '    """Nothing."""\n'
    )
    found = {name: _turns("queue", name, node) for name, node in _public(ast.parse(source), "")}
    assert [[answer for _, answer in turns] for turns in found.values()] == [
        ["A queue, e.g. of jobs.", "class Queue", "The class Queue is in the module queue."],
        [
            "Remove and return an item from the queue.",
            "Queue.get(self, block=True, timeout: float | None=None)",
            "The method Queue.get is in the module queue.",
        ],
        [],
    ]
    for (question, _), wordings in zip(found["Queue.get"], (WHAT, HOW, WHERE), strict=True):
        assert question in wordings
    record = _conversation("queue.Queue.get", "Queue.get", found["Queue.get"], found["Queue"])
    asked = [message["content"] for message in record["messages"] if message["role"] == "user"]
    assert len(asked) == 3 and all("Queue.get" in question for question in asked)
    assert record["rejected"] in [answer for _, answer in found["Queue"]]
    assert first_sentence("Too short.") == "Too short." and first_sentence("x" * 201) is None
    assert first_sentence("Is it? Yes.\n\nNo.") is None and first_sentence("`f` is quoted.") is None


def test_python_qa_has_the_answer_of_a_neighbor_as_the_rejected_one() -> None:
    found = [read_preference(record) for record in islice(python_qa(), 400)]
    different = [p for p in found if p.chosen and p.rejected and p.chosen.messages[-1] != p.rejected.messages[-1]]
    assert len(different) > 0.95 * len(found)
