"""Table of the evaluation sets. Sources of the prompts: `task.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minillama.errors import InputError
from minillama.evaluate.task import LETTERS, Form, Problem, Task

Value = Mapping[str, Any]
NO_YES = {"false": 0, "0": 0, "no": 0, "true": 1, "1": 1, "yes": 1}


def boolq(value: Value, subject: str) -> Problem:
    """BoolQ: SuperGLUE's records, or Google's, whose title SuperGLUE puts before the passage."""
    title = f"{value['title']} -- " if value.get("title") else ""
    fields = {"question": value["question"], "passage": title + value["passage"]}
    label = value.get("answer", value.get("label"))
    return Problem(fields, ("no", "yes"), NO_YES.get(str(label).lower(), -1))


def piqa(value: Value, subject: str) -> Problem:
    """PIQA, with labels of its .lst file."""
    return Problem({"question": value["goal"]}, (value["sol1"], value["sol2"]), int(value.get("label", -1)))


def siqa(value: Value, subject: str) -> Problem:
    """SIQA, with labels 1 to 3 of its .lst file or the letter `correct`."""
    gold = LETTERS.index(value["correct"]) if "correct" in value else int(value.get("label") or 0) - 1
    answers = (value["answerA"], value["answerB"], value["answerC"])
    return Problem({"question": value["question"], "context": value["context"]}, answers, gold)


def hellaswag(value: Value, subject: str) -> Problem:
    """HellaSwag's own records, or query, choices and gold."""
    if "query" in value:
        return Problem({"question": value["query"]}, tuple(value["choices"]), int(value["gold"]), is_clean=True)
    context = f"{value['activity_label']}: {value['ctx_a']} {value['ctx_b'].capitalize()}"
    label = value.get("label")
    return Problem({"question": context}, tuple(value["endings"]), -1 if label in (None, "") else int(label))


def winogrande(value: Value, subject: str) -> Problem:
    """WinoGrande's own records, or instructions (LLM-Adapters) with the sentence and its options inside."""
    if "sentence" in value:
        sentence, *options = value["sentence"], value["option1"], value["option2"]
    else:
        match = re.search(r"sentence: (.*?)\s*Option1: (.*?) Option2: (.*?) Answer format", value["instruction"], re.S)
        if match is None:
            raise ValueError("no sentence with its options in the instruction")
        sentence, *options = match.groups()
    sentence.index("_")
    return Problem({"question": sentence}, tuple(options), int(value.get("answer", "").removeprefix("option") or 0) - 1)


def lettered(value: Value, subject: str) -> Problem:
    """ARC and OpenBookQA: JSON of their authors or of Hugging Face, or OpenBookQA's TSV."""
    if "Question Stem" in value:
        texts = re.split(r"\s*\([A-D]\) ", value["Choices"])[1:]
        return Problem({"question": value["Question Stem"]}, tuple(texts), LETTERS.index(value["Answer Key"].strip()))
    question = value["question"] if "question" in value else value["question_stem"]
    choices = question["choices"] if isinstance(question, Mapping) else value["choices"]
    stem = question["stem"] if isinstance(question, Mapping) else question
    if isinstance(choices, Mapping):
        texts, labels = choices["text"], list(choices["label"])
    else:
        texts, labels = [choice["text"] for choice in choices], [choice["label"] for choice in choices]
    key = value.get("answerKey", "").strip()
    return Problem({"question": stem}, tuple(texts), labels.index(key) if key else -1)


def mmlu(value: Value, subject: str) -> Problem:
    """MMLU, and CMMLU whose columns are capitalized: CSV, or JSON with the number of the answer."""
    value = {name.lower(): content for name, content in value.items() if name}
    choices = value["choices"] if "choices" in value else [value[letter] for letter in "abcd"]
    answer = value["answer"]
    gold = LETTERS.index(answer) if isinstance(answer, str) and answer in LETTERS else int(answer)
    fields = {"question": value["question"], "stripped": value["question"].strip()}
    return Problem(fields, tuple(choices), gold, value.get("subject") or subject)


def bracketless(text: str, title: str = r" \[title\]") -> str:
    """HellaSwag's text without the marks of WikiHow in brackets."""
    return re.sub(r"\[.*?\]", "", re.sub(title, ". ", text.strip())).replace("  ", " ")


def _one_stop(text: str) -> str:
    return bracketless(text, r"\.? \[title\]")


def _question(prompt: str, ours: str, llama: str, olmes: str, stem: str = "Question: {question}") -> dict[str, Form]:
    """Forms of a set of questions; `stem` is OLMES's question line, or more."""
    return {
        "lm-eval": Form(prompt, ours),
        "llama": Form(prompt, llama),
        "olmes": Form(stem + "\nAnswer:", olmes, shots=5),
        "olmes-mc": Form(stem + "\n{letters}\nAnswer:", letter=" {letter}. {choice}", shots=5),
    }


def _about(form: Form, subject: str, **changes: Any) -> Form:
    about = "The following are multiple choice questions (with answers) about "
    return replace(form, description=f"{about}{subject}.\n\n", **changes)


QUESTION = "Question: {question}\nAnswer:"
BOOLQ = "{passage}\nQuestion: {question}"
_boolq = _question(BOOLQ + "?\nAnswer:", "acc", "acc_pmi", "acc", BOOLQ + "?")
_hellaswag = _question("{question}", "acc_norm", "acc_norm", "acc_norm", "{question}\nChoose the best continuation:")
_hellaswag["olmes"] = replace(_hellaswag["olmes"], prompt="{question}")
_winogrande = _question("", "acc", "acc", "acc", "Fill in the blank: {question}")
_winogrande["olmes"] = replace(_winogrande["olmes"], prompt="")
_letters = Form("{stripped}\n{letters}\nAnswer:", letter="{letter}. {choice}")
_mmlu = _question(QUESTION, "acc", "acc", "acc_norm", "Question: {stripped}")
_chinese = replace(
    _letters,
    prompt="{stripped}\n{letters}\n答案：",
    description="以下是关于{chinese}的单项选择题，请直接给出正确答案的选项。\n\n",
)

TASKS: dict[str, Task] = {
    "boolq": Task(
        "BoolQ",
        ("boolq", "BoolQ"),
        "val.jsonl (SuperGLUE), dev.jsonl (Google) or validation*.parquet",
        boolq,
        _boolq | {name: replace(_boolq[name], order=(1, 0)) for name in ("olmes", "olmes-mc")},
        curated="boolq",
    ),
    "piqa": Task(
        "PIQA",
        ("piqa",),
        "valid.jsonl with valid-labels.lst, or validation*.parquet",
        piqa,
        _question(QUESTION, "acc_norm", "acc_norm", "acc_norm", "Goal: {question}"),
        curated="piqa",
    ),
    "siqa": Task(
        "SIQA",
        ("siqa", "social_i_qa", "socialiqa"),
        "dev.jsonl with dev-labels.lst, or validation*.parquet",
        siqa,
        _question("Q: {context} {question}\nA:", "acc", "acc_norm", "acc_norm", "Question: {context} {question}"),
        curated="social_i_qa",
    ),
    "hellaswag": Task(
        "HellaSwag",
        ("hellaswag",),
        "hellaswag_val.jsonl, validation*.parquet, or *val*.txt.bz2 of six lines per record",
        hellaswag,
        {name: replace(f, clean=_one_stop if "olmes" in name else bracketless) for name, f in _hellaswag.items()},
        curated="hellaswag",
    ),
    "winogrande": Task(
        "WinoGrande",
        ("winogrande",),
        "dev.jsonl, or winogrande_xl/validation*.parquet",
        winogrande,
        _winogrande,
        unwanted=r"(train|winogrande)_(xs|s|m|l|debiased)\b",
        curated="winogrande",
    ),
    **{
        f"arc_{level}": Task(
            f"ARC-{level.capitalize()}",
            ("arc", "ai2_arc", f"arc_{level}", f"ARC-{level.capitalize()}"),
            f"ARC-{level.capitalize()}-Test.jsonl or -Dev.jsonl, or ARC-{level.capitalize()}/test*.parquet; no .csv",
            lettered,
            _question(QUESTION, ours, "acc_norm", olmes),
            splits=("test", "validation", "dev"),
            wanted=level,
            unwanted=r"\.csv\b",
            curated=f"ARC-{level.capitalize()}",
        )
        for level, ours, olmes in (("easy", "acc", "acc_norm"), ("challenge", "acc_norm", "acc_pmi"))
    },
    "openbookqa": Task(
        "OpenBookQA",
        ("openbookqa", "obqa"),
        "test.tsv or dev.tsv, test.jsonl or dev.jsonl, or main/test*.parquet",
        lettered,
        _question("{question}", "acc_norm", "acc_pmi", "acc_pmi"),
        splits=("test", "validation", "dev"),
        unwanted="additional",
        curated="openbookqa",
    ),
    "mmlu": Task(
        "MMLU",
        ("mmlu",),
        "test/SUBJECT_test.csv or val/SUBJECT_val.csv, and dev/SUBJECT_dev.csv for examples; or all/test*.parquet",
        mmlu,
        {
            "lm-eval": _about(_letters, "{subject}"),
            # as hendrycks/test: two spaces, and spaces of the question stay
            "llama": _about(_letters, " {subject}", shots=5, prompt="{question}\n{letters}\nAnswer:"),
            "olmes": _about(_mmlu["olmes"], "{subject}"),
            "olmes-mc": _about(_mmlu["olmes-mc"], "{subject}"),
        },
        splits=("test", "validation"),
        examples=("dev",),
        columns=("question", "a", "b", "c", "d", "answer"),
        first=True,
    ),
    "cmmlu": Task(
        "CMMLU",
        ("cmmlu",),
        "test/SUBJECT.csv or dev/SUBJECT.csv",
        mmlu,
        {"lm-eval": _chinese, "llama": replace(_chinese, shots=5)},
        splits=("test", "dev"),
        examples=("dev",),
        first=True,
    ),
}
NINE = tuple(name for name in TASKS if name != "cmmlu")


def named(names: Sequence[str], where: str = "--tasks") -> dict[str, Task]:
    """Sets by their names; `all` are LLaMA's nine, of which ARC has two parts.

    Args:
        names: of the setting `where`.

    Raises:
        InputError: no such set.
    """
    wanted = dict.fromkeys(
        name for word in names for part in word.split(",") for name in (NINE if part == "all" else (part,))
    )
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        found = ", ".join(unknown) or "none"
        raise InputError("no such evaluation set", where=where, found=found, expected=f"all, {', '.join(TASKS)}")
    return {name: TASKS[name] for name in wanted}
