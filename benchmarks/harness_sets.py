"""The nine sets and CMMLU for lm-evaluation-harness with local records: its own task files, with the data replaced."""

from __future__ import annotations

import bz2
import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

Doc = dict[str, Any]
SETS = {  # ours: their task, its file, and the splits of their file
    "boolq": ("boolq", "super_glue/boolq/default.yaml", "validation"),
    "piqa": ("piqa", "piqa/piqa.yaml", "validation"),
    "siqa": ("social_iqa", "siqa/siqa.yaml", "validation"),
    "hellaswag": ("hellaswag", "hellaswag/hellaswag.yaml", "validation"),
    "winogrande": ("winogrande", "winogrande/default.yaml", "validation"),
    "arc_easy": ("arc_easy", "arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc_challenge", "arc/arc_challenge.yaml", "test"),
    "openbookqa": ("openbookqa", "openbookqa/openbookqa.yaml", "test"),
}


def lines(path: Path) -> list[Doc]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def labelled(path: Path, kind: Callable[[str], object]) -> list[Doc]:
    labels = path.with_name(path.stem + "-labels.lst").read_text().split()
    return [doc | {"label": kind(label)} for doc, label in zip(lines(path), labels, strict=True)]


def hellaswag(path: Path) -> Iterator[Doc]:
    text = bz2.decompress(path.read_bytes()).decode().split("\n")
    for i in range(0, len(text) - 5, 6):
        label, context = text[i].split(": ", 1)
        yield {
            "activity_label": label,
            "ctx_a": context,
            "ctx_b": "",
            "endings": text[i + 2 : i + 6],
            "label": text[i + 1],
        }


def winogrande(path: Path) -> Iterator[Doc]:
    for doc in json.loads(path.read_text(encoding="utf-8")):
        text = doc["instruction"].split("sentence: ", 1)[1].rsplit(" Answer format", 1)[0]
        sentence, options = text.rsplit("Option1: ", 1)
        first, second = options.split(" Option2: ")
        number = doc["answer"].removeprefix("option")
        yield {"sentence": sentence.strip(), "option1": first, "option2": second, "answer": number}


def arc(path: Path) -> Iterator[Doc]:
    for doc in lines(path):
        choices = doc["question"]["choices"]
        listed = {"text": [one["text"] for one in choices], "label": [one["label"] for one in choices]}
        yield {"id": doc["id"], "question": doc["question"]["stem"], "choices": listed, "answerKey": doc["answerKey"]}


def openbookqa(path: Path) -> Iterator[Doc]:
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        name, stem, choices, _, key = line.split("\t")
        match = re.match(r"^\(A\) (.*) \(B\) (.*) \(C\) (.*) \(D\) (.*)$", choices)
        assert match is not None
        yield {
            "id": name,
            "question_stem": stem,
            "choices": {"text": [*match.groups()], "label": [*"ABCD"]},
            "answerKey": key,
        }


def documents(data: Path, name: str) -> list[Doc]:
    """Documents as Hugging Face has them."""
    found: dict[str, Callable[[], Any]] = {
        "boolq": lambda: [
            d | {"label": int(str(d["label"]).lower() == "true")} for d in lines(data / "boolq/val.jsonl")
        ],
        "piqa": lambda: labelled(data / "piqa/valid.jsonl", int),
        "siqa": lambda: labelled(data / "siqa/dev.jsonl", str),
        "hellaswag": lambda: hellaswag(data / "hellaswag/hellaswag_val_full.txt.bz2"),
        "winogrande": lambda: winogrande(data / "winogrande/test.json"),
        "arc_easy": lambda: arc(data / "arc/ARC-Easy-Dev.jsonl"),
        "arc_challenge": lambda: arc(data / "arc/ARC-Challenge-Dev.jsonl"),
        "openbookqa": lambda: openbookqa(data / "openbookqa/dev.tsv"),
    }
    return list(found[name]())


def mmlu(path: Path) -> list[Doc]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{"question": q, "choices": c, "answer": "ABCD".index(a)} for q, *c, a in csv.reader(file)]


def cmmlu(path: Path) -> list[Doc]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [{name: text for name, text in row.items() if name} for row in csv.DictReader(file)]


def write_tasks(data: Path, folder: Path, names: list[str], limit: int = 0) -> dict[str, list[str]]:
    """Task files of the harness in a folder; its task names by ours: 57 of MMLU, 67 of CMMLU (its dev part).

    Args:
        data: the folder of the sets.
        folder: for the task files, their records, and the harness's cache.
        names: ours.
        limit: documents per task, of MMLU and CMMLU over all subjects, round by round.
    """
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import lm_eval

    own = Path(lm_eval.__file__).parent / "tasks"
    made: dict[str, list[str]] = {}

    def add(name: str, task: str, include: str, splits: dict[str, list[Doc]]) -> None:
        files = {}
        for split, docs in splits.items():
            files[split] = str(folder / f"{task}-{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
        changes = {"include": str(own / include), "task": f"local_{task}", "dataset_path": "json", "dataset_name": None}
        changes |= {"dataset_kwargs": {"data_files": files}, "training_split": None, "tag": None}
        for split in ("validation", "test"):
            changes[f"{split}_split"] = split if split in splits else None
        (folder / f"local_{task}.yaml").write_text(json.dumps(changes))
        made.setdefault(name, []).append(f"local_{task}")

    for name in names:
        if name in SETS:
            task, include, split = SETS[name]
            add(name, task, include, {split: documents(data, name)[: limit or None]})
            continue
        subjects = sorted(path.stem.removesuffix("_dev") for path in (data / name / "dev").glob("*.csv"))
        is_mmlu = name == "mmlu"
        read, part = (mmlu, "_dev") if is_mmlu else (cmmlu, "")
        examples = {s: read(data / f"{name}/dev/{s}{part}.csv") for s in subjects}
        tests = {s: mmlu(data / f"mmlu/val/{s}_val.csv") for s in subjects} if is_mmlu else examples
        rounds = (
            (s, docs[i]) for i in range(max(map(len, tests.values()))) for s, docs in tests.items() if i < len(docs)
        )
        chosen = list(rounds)[: limit or None]
        for subject in subjects:
            docs = [doc for s, doc in chosen if s == subject]
            if docs:
                file = f"{'mmlu/default' if is_mmlu else name}/{name}_{subject}.yaml"
                add(name, f"{name}_{subject}", file, {"test": docs, "dev": examples[subject]})
    return made


def evaluate(model: Any, folder: Path, tasks: list[str], shots: int | None, limit: int | None = None) -> dict[str, Any]:
    """The harness's results of a model, with samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    settings: dict[str, Any] = {"num_fewshot": shots, "task_manager": manager, "limit": limit}
    return dict(simple_evaluate(model, tasks=tasks, log_samples=True, bootstrap_iters=0, verbosity="ERROR", **settings))


def sums(results: dict[str, Any], tasks: list[str]) -> list[list[float]]:
    """Sums of log-probabilities per choice, document by document, task by task."""
    found = []
    for task in tasks:
        for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"]):
            found.append([float(reply[0][0]) for reply in sample["resps"]])
    return found


def accuracy(results: dict[str, Any], tasks: list[str], metric: str) -> float | None:
    """Accuracy over all documents of the tasks."""
    values = [sample.get(metric) for task in tasks for sample in results["samples"][task]]
    return None if None in values else sum(map(float, chain(values))) / len(values)
