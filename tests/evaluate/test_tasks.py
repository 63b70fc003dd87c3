"""Evaluation sets: prompts, published forms of the same records, few-shot examples, missing and unlabelled files."""

from __future__ import annotations

import bz2
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minillama.errors import InputError
from minillama.evaluate.task import Item
from minillama.evaluate.tasks import NINE, TASKS, named

CHOICES = {"text": ["a kite", "a stone", "a lamp"], "label": ["A", "B", "C"]}
HEADER = "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n"
# per set: files of one and the same record, in each form in which it is published
FORMS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"boolq/val.jsonl": [{"question": "is it", "passage": "Fog -- It is.", "idx": 3, "label": "true"}]},
        {"boolq/dev.jsonl": [{"question": "is it", "title": "Fog", "passage": "It is.", "answer": True}]},
        {"BoolQ/validation-0.parquet": [{"question": "is it", "passage": "Fog -- It is.", "label": 1}]},
    ],
    "piqa": [
        {"piqa/valid.jsonl": [{"goal": "Dry it.", "sol1": "Sun. ", "sol2": "Rain."}], "piqa/valid-labels.lst": "1\n"},
        {"piqa/plain_text/validation-0.parquet": [{"goal": "Dry it.", "sol1": "Sun. ", "sol2": "Rain.", "label": 1}]},
    ],
    "siqa": [
        {
            "siqa/dev.jsonl": [
                {"context": "He left.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z"}
            ],
            "siqa/dev-labels.lst": "3\n",
        },
        {
            "social_i_qa/socialIQa_v1.4_dev.jsonl": [
                {
                    "context": "He left.",
                    "question": "Why?",
                    "answerA": "x",
                    "answerB": "y",
                    "answerC": "z",
                    "correct": "C",
                }
            ]
        },
        {
            "siqa/validation-0.parquet": [
                {
                    "context": "He left.",
                    "question": "Why?",
                    "answerA": "x",
                    "answerB": "y",
                    "answerC": "z",
                    "label": "3",
                }
            ]
        },
    ],
    "hellaswag": [
        {
            "hellaswag/hellaswag_val.jsonl": [
                {
                    "activity_label": "Cooking",
                    "ctx_a": "A pot. [title] Boil",
                    "ctx_b": "the Cook",
                    "endings": ["[step] waits.", "runs  off.", "sings.", "stirs."],
                    "label": 0,
                }
            ]
        },
        {
            "hellaswag/val.txt.bz2": bz2.compress(
                b"Cooking: A pot.. Boil The cook\n0\n waits.\nruns off.\nsings.\nstirs.\n"
            )
        },
        *(
            {
                f"hellaswag/validation{ending}": [
                    {
                        "ind": 4,
                        "activity_label": "Cooking",
                        "ctx_a": "A pot. [title] Boil",
                        "ctx_b": "the Cook",
                        "ctx": "A pot. [title] Boil the Cook",
                        "endings": ["[step] waits.", "runs  off.", "sings.", "stirs."],
                        "split": "val",
                        "label": "0",
                    }
                ]
            }
            for ending in ("-0.parquet", ".json")
        ),
    ],
    "winogrande": [
        {
            "winogrande/dev.jsonl": [
                {"sentence": "The cat saw the dog as _ ran.", "option1": "cat", "option2": "dog", "answer": "2"}
            ]
        },
        {
            "winogrande/test.json": [
                {
                    "instruction": "Fill the sentence: The cat saw the dog as _ ran.\n\n"
                    "Option1: cat Option2: dog Answer format: option1/option2",
                    "answer": "option2",
                }
            ]
        },
        {
            "winogrande/winogrande_xl/validation-0.parquet": [
                {"sentence": "The cat saw the dog as _ ran.", "option1": "cat", "option2": "dog", "answer": "2"}
            ]
        },
    ],
    "arc_easy": [
        {
            "arc/ARC-Easy-Dev.jsonl": [
                {
                    "id": "q",
                    "question": {
                        "stem": "What flies?",
                        "choices": [{"text": t, "label": n} for t, n in zip(CHOICES["text"], "123", strict=True)],
                    },
                    "answerKey": "1",
                }
            ],
            "arc/ARC-Challenge-Test.jsonl": [],
        },
        {"ai2_arc/ARC-Easy/test-0.parquet": [{"question": "What flies?", "choices": CHOICES, "answerKey": "A"}]},
    ],
    "openbookqa": [
        {"openbookqa/dev.tsv": f'{HEADER}1\tA "wind" lifts\t(A) a kite (B) a stone (C) a lamp (D) it\tx\tA\n'},
        {
            "openbookqa/main/test-0.parquet": [
                {
                    "question_stem": 'A "wind" lifts',
                    "choices": {"text": [*CHOICES["text"], "it"], "label": ["A", "B", "C", "D"]},
                    "answerKey": " A",
                }
            ]
        },
    ],
    "mmlu": [
        {
            "mmlu/test/moral_tests_test.csv": '"Is ""it"", well, so? ",yes,no,0,1,C\n',
            "mmlu/dev/moral_tests_dev.csv": "x,1,2,3,4,B\n",
        },
        {
            "mmlu/all/test-0.parquet": [
                {
                    "question": 'Is "it", well, so? ',
                    "subject": "moral_tests",
                    "choices": ["yes", "no", "0", "1"],
                    "answer": 2,
                }
            ],
            "mmlu/moral_tests/test-0.parquet": [],
        },
    ],
}

CMMLU: list[dict[str, Any]] = [
    {"cmmlu/test/agronomy.csv": ",Question,A,B,C,D,Answer\n0,草鱼吃什么？,草,鱼,虾,米,A\n"},
    {
        "cmmlu/agronomy/test-0.parquet": [
            {"Question": "草鱼吃什么？", "A": "草", "B": "鱼", "C": "虾", "D": "米", "Answer": "A"}
        ]
    },
]


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes | str):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        elif path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(json.dumps(content, indent=1))
    return folder


def load(name: str, folder: Path, *more: Any) -> list[Item]:
    return TASKS[name].load(folder, *(more or ("lm-eval",)))


@pytest.mark.parametrize("name", [*FORMS, "cmmlu"])
def test_published_forms_are_the_same_item(name: str, tmp_path: Path) -> None:
    forms = FORMS.get(name, CMMLU)
    found = [load(name, write(tmp_path / str(i), files))[0] for i, files in enumerate(forms)]
    assert all(item == found[0] for item in found)


def test_prompts_are_the_harness_s(tmp_path: Path) -> None:
    shown = {name: load(name, write(tmp_path / name, forms[0]))[0] for name, forms in FORMS.items()}
    assert shown["boolq"].pairs[1] == ("Fog -- It is.\nQuestion: is it?\nAnswer:", " yes") and shown["boolq"].gold == 1
    assert shown["piqa"].pairs[0] == ("Question: Dry it.\nAnswer:", " Sun. ") and shown["piqa"].choices[0] == "Sun. "
    assert shown["siqa"].pairs[2] == ("Q: He left. Why?\nA:", " z") and shown["siqa"].gold == 2
    assert shown["hellaswag"].pairs[0] == ("Cooking: A pot.. Boil The cook", "  waits.")
    assert shown["winogrande"].pairs == (
        ("The cat saw the dog as cat", " ran."),
        ("The cat saw the dog as dog", " ran."),
    )
    assert shown["winogrande"].choices == ()
    assert shown["arc_easy"].pairs[0] == ("Question: What flies?\nAnswer:", " a kite")
    assert shown["openbookqa"].pairs[3] == ('A "wind" lifts', " it")
    assert shown["mmlu"].pairs[2] == (
        "The following are multiple choice questions (with answers) about moral tests.\n\n"
        'Is "it", well, so?\nA. yes\nB. no\nC. 0\nD. 1\nAnswer:',
        " C",
    )


def test_styles_differ_as_they_should(tmp_path: Path) -> None:
    for name, forms in FORMS.items():
        write(tmp_path, forms[0])
        assert set(TASKS[name].forms) == {"lm-eval", "llama", "olmes", "olmes-mc"}
    llama = load("mmlu", tmp_path, "llama", 1)[0].pairs[0][0]
    assert "about  moral tests.\n\nx\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n" in llama and "so? \nA. yes" in llama
    assert load("boolq", tmp_path, "llama")[0].prior == (("Answer:", " no"), ("Answer:", " yes"))
    cloze = load("piqa", tmp_path, "olmes", 0)[0]
    assert cloze.pairs[0][0] == "Goal: Dry it.\nAnswer:"
    lettered = load("boolq", tmp_path, "olmes-mc", 0)[0]
    assert (
        lettered.pairs[0] == ("Fog -- It is.\nQuestion: is it?\n A. yes\n B. no\nAnswer:", " A") and lettered.gold == 0
    )
    assert load("winogrande", tmp_path, "olmes-mc", 0)[0].pairs[1] == (
        "Fill in the blank: The cat saw the dog as _ ran.\n A. cat\n B. dog\nAnswer:",
        " B",
    )
    with pytest.raises(InputError, match="examples of OLMES are missing"):
        load("piqa", tmp_path, "olmes")


def test_missing_and_unlabelled_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="files of PIQA are missing") as error:
        load("piqa", tmp_path)
    assert "piqa" in str(error.value.where) and "valid-labels.lst" in str(error.value.expected)
    write(tmp_path, {"piqa/test.jsonl": [{"goal": "a", "sol1": "b", "sol2": "c"}]})
    with pytest.raises(InputError, match="record without its answer"):
        load("piqa", tmp_path)
    write(tmp_path, {"piqa/valid.jsonl": [{"goal": "a", "sol1": "b", "sol2": "c"}], "piqa/valid-labels.lst": "0\n1\n"})
    with pytest.raises(InputError, match="labels and records differ in number"):
        load("piqa", tmp_path)
    write(tmp_path, {"boolq/val.jsonl": [{"query": "a"}]})
    with pytest.raises(InputError, match="not a record of BoolQ") as error:
        load("boolq", tmp_path)
    assert str(error.value.where).endswith("val.jsonl:1")
    with pytest.raises(InputError, match="no such evaluation set"):
        named(["piqa", "pika"])
    with pytest.raises(InputError) as error:
        named(["pika"], "validate.tasks")
    assert error.value.where == "validate.tasks"
    assert tuple(named(["all"])) == NINE and tuple(named(["piqa,mmlu", "piqa"])) == ("piqa", "mmlu")


def test_subjects_of_compressed_files(tmp_path: Path) -> None:
    line = b"Bones?,1,2,3,4,A\n"
    write(tmp_path, {"mmlu/val/anatomy_val.csv.gz": gzip.compress(line), "mmlu/val/virology_val.csv": line})
    assert [item.subject for item in load("mmlu", tmp_path)] == ["anatomy", "virology"]


def test_a_set_without_records_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"piqa/valid.jsonl": [], "piqa/valid-labels.lst": ""})
    with pytest.raises(InputError, match="no record of PIQA") as error:
        load("piqa", tmp_path)
    assert str(error.value.where) == f"{tmp_path}/piqa/valid.jsonl"


def test_nothing_is_read_twice(tmp_path: Path) -> None:
    """A folder under two names, as on a disk that knows no case; two names of one part; a file and its archive."""
    write(tmp_path, FORMS["boolq"][0])
    (tmp_path / "BoolQ").symlink_to(tmp_path / "boolq")
    assert len(load("boolq", tmp_path)) == 1
    records = [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}]
    for names in (("valid.jsonl", "validation.jsonl"), ("val.json", "val.json.gz")):
        folder = tmp_path / names[0]
        write(folder, {f"piqa/{names[0]}": records, f"piqa/{names[1]}": gzip.compress(b"{}")})
        with pytest.raises(InputError, match="two files of the same part") as error:
            load("piqa", folder)
        assert names[0] in str(error.value.found) and names[1] in str(error.value.found)
    write(tmp_path, {f"siqa/validation-{i}.parquet": FORMS["siqa"][2]["siqa/validation-0.parquet"] for i in (0, 1)})
    assert len(load("siqa", tmp_path)) == 2  # parts of one


@pytest.mark.slow
def test_real_sets_have_their_size_and_labels(shared: Path) -> None:
    """Shares of each answer as counted elsewhere: a scorer stuck on one index would show them."""
    shares = {
        "boolq": [37.83, 62.17],
        "piqa": [49.51, 50.49],
        "siqa": [32.91, 33.47, 33.62],
        "winogrande": [49.57, 50.43],
        "hellaswag": [25.04, 24.75, 25.73, 24.48],
        "openbookqa": [25.2, 27.6, 22.0, 25.2],
    }
    sizes = {"arc_easy": 570, "arc_challenge": 299, "mmlu": 1531, "cmmlu": 335}
    for name, expected in shares.items():
        items = load(name, shared / "eval")
        counts = Counter(item.gold for item in items)
        assert [round(100 * counts[i] / len(items), 2) for i in range(len(expected))] == expected
    for name, size in sizes.items():
        items = load(name, shared / "eval")
        assert len(items) == size and len({item.id for item in items}) == size
    assert Counter(len(item.pairs) for item in load("arc_easy", shared / "eval")) == {4: 567, 5: 2, 3: 1}
    assert Counter(item.subject for item in load("mmlu", shared / "eval", "lm-eval", 5, 114)).most_common()[-1][1] == 2


def test_mmlu_prompts_are_those_of_another_project(shared: Path) -> None:
    """1531 finished zero-shot prompts, in the wording of hendrycks/test."""
    lines = (shared / "eval/mmlu/zero_shot_mmlu_val.json").read_text(encoding="utf-8").splitlines()
    items = {item.id: item for item in load("mmlu", shared / "eval", "llama", 0)}
    seen = Counter[str]()
    for record in map(json.loads, lines):
        item = items[f"{record['subject']}/{seen[record['subject']]}"]
        seen[record["subject"]] += 1
        assert (item.pairs[0][0], "ABCD"[item.gold]) == (record["input"], record["output"])
    assert seen.total() == len(items)


def test_few_shot_examples_are_never_the_question(shared: Path, tmp_path: Path) -> None:
    for item in load("cmmlu", shared / "eval", "lm-eval", 4, 67):
        *examples, question = item.pairs[0][0].split("。\n\n", 1)[1].split("\n\n")
        assert len(examples) == 4 and question not in [example.rsplit(" ", 1)[0] for example in examples]
        assert item.pairs[0][0].startswith("以下是关于")
    with pytest.raises(InputError, match="too few examples of CMMLU") as error:
        load("cmmlu", shared / "eval", "llama")
    assert (error.value.found, error.value.expected) == ("4 agronomy", 5)
    curated = load("arc_challenge", shared / "eval", "olmes", None, 3)
    assert len({item.pairs[0][0].rpartition("\n\n")[0] for item in curated}) == 1  # the same five for all
    assert curated[0].pairs[0][0].startswith("Question: George wants to warm his hands quickly by rubbing them.")
    drawn = load("piqa", shared / "eval", "lm-eval", 2, 3)
    assert len({item.pairs[0][0].rpartition("\n\n")[0] for item in drawn}) == 3
    assert len(load("boolq", shared / "eval", "olmes", 0)) == 1000
