"""Decontamination: n-grams of training text that evaluation sets have. Brown et al. 2020, arXiv 2005.14165, C."""

from __future__ import annotations

import gzip
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from minillama.data.cleaning.words import words
from minillama.data.reading import format_of, holds_records, read_lines, read_records
from minillama.data.sources import valid
from minillama.errors import InputError
from minillama.evaluate.task import Form, Problem
from minillama.evaluate.tasks import TASKS
from minillama.files import digest, read_json, replace_file, replace_text

SHORTEST = 8  # words of a text that is shorter than n and still looked for, as a whole


class Hit(NamedTuple):
    """Overlap of a document with an item."""

    where: str
    set: str
    item: str
    words: str


def normalized(text: str) -> list[str]:
    """Words in lower case without punctuation; a Chinese character is a word."""
    return [word for word in words(unicodedata.normalize("NFKC", text).lower()) if word[0].isalnum()]


class Index:
    """n-grams of evaluation sets.

    Args:
        folder: of the sets; all of a set's parts but the training part count.
        n: words per n-gram. A text of fewer is one n-gram if it has 8 or more.

    Attributes:
        items: number of items by set; `short` those without any n-gram.

    Raises:
        InputError: there is no set in the folder, or n is below 1.
    """

    def __init__(self, folder: Path, n: int = 13) -> None:
        self.n, self.first = n, min(n, SHORTEST)
        self.grams: dict[tuple[str, ...], dict[tuple[str, ...], tuple[str, str]]] = {}
        self.items: dict[str, int] = {}
        self.short = 0
        for name, task in TASKS.items():
            for number, (where, problem) in enumerate(task.problems(folder)):
                self.items[name] = number + 1
                texts = _texts(problem, task.forms["lm-eval"])
                self.short += not sum(self._add(text, name, where) for text in dict.fromkeys(texts))
        if not self.items:
            raise InputError("there is no evaluation set in this folder", where=folder, expected=", ".join(TASKS))

    def _add(self, text: str, name: str, where: str) -> int:
        found = normalized(text)
        size = self.n if len(found) >= self.n else len(found)
        if size < self.first:
            return 0
        for start in range(len(found) - size + 1):
            gram = tuple(found[start : start + size])
            self.grams.setdefault(gram[: self.first], {}).setdefault(gram, (name, where))
        return len(found) - size + 1

    def hits(self, text: str, where: str) -> list[Hit]:
        """Items of which a document has an n-gram, each once with its first."""
        found, known = normalized(text), {}
        for start in range(len(found) - self.first + 1):
            for gram, (name, item) in self.grams.get(tuple(found[start : start + self.first]), {}).items():
                if (name, item) not in known and tuple(found[start : start + len(gram)]) == gram:
                    known[name, item] = Hit(where, name, item, " ".join(gram))
        return [*known.values()]


def _texts(problem: Problem, form: Form) -> list[str]:
    """Texts of an item, as published and as a prompt has them: fields, answers, the question with its right answer."""
    question = problem.fields["question"]
    if form.prompt:
        right = problem.choices[problem.gold :][:1] if problem.gold >= 0 else ()  # a test part may lack it
        joined = [f"{question} {choice}" for choice in right]
    else:  # the answer stands at the blank; where it is not known, each does
        right = problem.choices[problem.gold :][:1] if problem.gold >= 0 else problem.choices
        joined = [question.replace("_", choice, 1) for choice in right]
    texts = [*problem.fields.values(), *problem.choices, *joined]
    return texts if problem.is_clean else [*texts, *map(form.clean, texts)]


class Text(NamedTuple):
    """Document of a file: its line as it stands, the text that is compared, and its location."""

    line: str
    text: str
    where: str


def texts(path: Path) -> Iterator[Text]:
    """Documents: the records of a JSON or JSONL file with all their strings, or the paragraphs of a text.

    Raises:
        InputError: a file that cannot be read.
    """
    if holds_records(path):
        raw = valid(read_lines(path))
        for record in valid(read_records(path)):
            if record.where.startswith(f"{path}:"):  # kept as it stands: 1.10 is no 1.1
                line = next(line.text for line in raw if line.where == record.where)
            else:  # a record of an array
                line = json.dumps(record.value, ensure_ascii=False).encode(errors="replace").decode()
            yield Text(line, " \n".join(_strings(record.value)), record.where)
        return
    number = 0
    for has_text, lines in groupby(valid(read_lines(path)), lambda line: bool(line.text.strip())):
        if has_text:
            number, paragraph = number + 1, "\n".join(line.text for line in lines)
            yield Text(paragraph + "\n", paragraph, f"{path}, paragraph {number}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


@dataclass(frozen=True)
class Decontaminated:
    """Record beside a decontaminated file, which a run's provenance repeats."""

    sha256: str
    source: str
    n: int
    items: dict[str, int]
    documents: int
    removed: int


def marker(path: Path) -> Path:
    """Place of the record beside a file."""
    return path.with_name(path.name + ".decontaminated.json")


def write(path: Path, source: Path, index: Index, lines: Iterable[str | None]) -> Decontaminated:
    """Write documents as they come, None for one that is removed, and the record beside them; .gz is compressed.

    Raises:
        InputError: another compression, a name of JSON, or the file cannot be written.
    """
    if format_of(path) == ".json":
        what, fix = "documents are written as lines, which a .json file has not", "give a name in .jsonl"
        raise InputError(what, where="--remove", found=path, expected=".jsonl, or .txt of a text", fix=fix)
    if path.suffix.lower() == ".zst":
        fix = "give a name in .gz, or one without"
        raise InputError("this compression is not written", where="--remove", found=path, expected=".gz", fix=fix)
    counts = Counter[bool]()

    def fill(temporary: Path) -> None:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(temporary, "wt", encoding="utf-8", newline="\n") as file:
            for line in lines:
                counts[line is None] += 1
                file.write("" if line is None else line + "\n")

    replace_file(path, fill)
    record = Decontaminated(digest(path), str(source), index.n, index.items, counts.total(), counts[True])
    replace_text(marker(path), json.dumps(asdict(record), indent=2) + "\n")
    return record


def record_of(path: Path) -> dict[str, Any] | None:
    """Record of a file, if it has one and is still the file that was written."""
    try:
        record = read_json(marker(path))
        return record if record["sha256"] == digest(path) else None
    except (InputError, OSError, KeyError):
        return None


def by_set(hits: Sequence[Hit], items: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Items of each set of which a document has an n-gram, and all of its items."""
    return {name: (len({hit.item for hit in hits if hit.set == name}), count) for name, count in items.items()}
