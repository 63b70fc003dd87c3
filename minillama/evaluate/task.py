"""Evaluation set: files, prompts, few-shot examples and normalization, by style. `tasks.py` has the table of sets.

Styles: `lm-eval`, EleutherAI's harness 0.4; `llama`, LLaMA's report (arXiv 2302.13971, §3) with the harness's prompts;
`olmes`, the cloze form of OLMES (arXiv 2406.08446), and `olmes-mc`, its multiple-choice form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from minillama.data.archives import plain_name
from minillama.errors import InputError
from minillama.evaluate import files
from minillama.evaluate.cmmlu_subjects import SUBJECTS
from minillama.evaluate.files import Row

Style = Literal["lm-eval", "llama", "olmes", "olmes-mc"]
LETTERS = "ABCDE"
CURATED = "fewshot/olmes_std_fewshot.json"
SEED = 1234  # of few-shot examples and samples, in the harness and in OLMES


class Problem(NamedTuple):
    """Question as a record has it: fields of prompts, answers, index of the right one; `is_clean` if it was edited."""

    fields: Mapping[str, str]
    choices: tuple[str, ...]
    gold: int
    subject: str = ""
    is_clean: bool = False


@dataclass(frozen=True)
class Item:
    """Multiple-choice item.

    Args:
        id: unique in its set, the same in every style.
        pairs: context and continuation per choice.
        choices: answers, by the length of which sums are normalized; none where that means nothing.
        gold: index of the right choice.
        subject: of a set that has subjects.
        prior: pairs for P(continuation | "Answer:"), if they are needed.
    """

    id: str
    pairs: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    gold: int
    subject: str = ""
    prior: tuple[tuple[str, str], ...] = ()


def _whole(text: str) -> str:
    return text


@dataclass(frozen=True)
class Form:
    """Prompt and normalization of a set in one style.

    Args:
        prompt: of a problem's fields and {letters}; empty: the text with each answer filled in at its "_", of which
            the part behind the blank is scored (Trinh and Le 2018, arXiv 1806.02847).
        metric: by which the style reports the set.
        letter: line per answer of {letters}, whose letters are the continuations then.
        description: in front of everything, once, with the {subject} or its {chinese} name.
        shots: number of few-shot examples.
        clean: applied to the question and its answers.
        order: of the answers.
    """

    prompt: str
    metric: str = "acc"
    letter: str = ""
    description: str = ""
    shots: int = 0
    clean: Callable[[str], str] = _whole
    order: tuple[int, ...] = ()

    def ask(self, problem: Problem) -> tuple[list[str], list[str]]:
        """Contexts, one per choice where they differ, and continuations."""
        clean = _whole if problem.is_clean else self.clean
        choices = [clean(choice) for choice in problem.choices]
        fields = {name: clean(text) for name, text in problem.fields.items()}
        if not self.prompt:
            before, _, after = fields["question"].partition("_")
            return [before + choice for choice in choices], [" " + after.strip()] * len(choices)
        lines = zip(LETTERS, choices, strict=False)
        shown = "\n".join(self.letter.format(letter=letter, choice=choice) for letter, choice in lines)
        context = self.prompt.format(**fields, letters=shown)
        answers = LETTERS[: len(choices)] if self.letter else choices
        return [context] * len(choices), [" " + answer for answer in answers]

    def item(self, name: str, problem: Problem, examples: Sequence[Problem]) -> Item:
        """Item of a problem behind few-shot examples."""
        subject, chinese = problem.subject.replace("_", " "), SUBJECTS.get(problem.subject, problem.subject)
        before = self.description.format(subject=subject, chinese=chinese)
        for example in map(self._ordered, examples):
            contexts, continuations = self.ask(example)
            before += contexts[example.gold] + continuations[example.gold] + "\n\n"
        problem = self._ordered(problem)
        contexts, continuations = self.ask(problem)
        pairs = tuple((before + context, end) for context, end in zip(contexts, continuations, strict=True))
        choices = tuple(end[1:] for end in continuations) if self.prompt else ()
        prior = tuple(("Answer:", end) for end in continuations) if self.metric == "acc_pmi" else ()
        return Item(name, pairs, choices, problem.gold, problem.subject, prior)

    def _ordered(self, problem: Problem) -> Problem:
        if not self.order:
            return problem
        choices = tuple(problem.choices[i] for i in self.order)
        return problem._replace(choices=choices, gold=self.order.index(problem.gold))


@dataclass(frozen=True)
class Task:
    """Evaluation set.

    Args:
        title: its name in the literature.
        folders: names of its folder.
        expected: names of its files, for messages.
        problem: reader of a record in any of its published forms.
        forms: by style.
        splits: those that are evaluated, the first that is there.
        examples: splits of few-shot examples, the first that is there.
        wanted: pattern of its files' paths.
        unwanted: pattern of others.
        columns: names for those of a CSV file without header.
        curated: its name among the few-shot examples of OLMES.
        first: few-shot examples are the first ones of the subject, not drawn.
    """

    title: str
    folders: tuple[str, ...]
    expected: str
    problem: Callable[[Mapping[str, Any], str], Problem]
    forms: Mapping[str, Form]
    splits: tuple[str, ...] = ("validation", "dev", "test")
    examples: tuple[str, ...] = ("train", "validation", "dev", "test")
    wanted: str = ""
    unwanted: str = ""
    columns: tuple[str, ...] = ()
    curated: str = ""
    first: bool = False

    def load(self, folder: Path, style: Style, shots: int | None = None, limit: int = 0) -> list[Item]:
        """Items of the set.

        Args:
            folder: that holds the folders of the sets.
            style: of prompts and normalization.
            shots: few-shot examples; the style's own number unless given.
            limit: the first so many items, as many of each subject; 0: all, of OLMES 1000 of a set over 1500.

        Raises:
            InputError: no file of the set, or one that is not as published; too few examples; a set without this style.
        """
        if style not in self.forms:
            raise InputError(f"{self.title} has no prompt in this style", found=style, expected=", ".join(self.forms))
        form = replace(self.forms[style], shots=self.shots(style, shots))
        found, split = self._files(folder), self.split(folder)
        if not split:
            where = f"{folder}/{self.folders[0]}"
            raise InputError(f"the files of {self.title} are missing", where=where, expected=self.expected)
        examples = self._examples(folder, style, found, split, form.shots)
        named: dict[str, list[tuple[str, Problem]]] = {}
        for problem in self._read(found[split]):
            of = named.setdefault(problem.subject, [])
            of.append((f"{problem.subject}/{len(of)}" if problem.subject else str(len(of)), problem))
        if not named:
            where = ", ".join(map(str, found[split]))
            raise InputError(f"there is no record of {self.title}", where=where, expected=self.expected)
        chosen = [pair for each in zip_longest(*named.values()) for pair in each if pair is not None]
        if style.startswith("olmes") and not limit and not self.first and len(chosen) > 1500:
            chosen = Random(SEED).sample(chosen, 1000)
        chosen = chosen[: limit or None]
        return [form.item(name, one, examples.of(one, form.shots)) for name, one in chosen]

    def shots(self, style: Style, given: int | None = None) -> int:
        """Number of few-shot examples: the style's own unless given."""
        return self.forms[style].shots if given is None else given

    def split(self, folder: Path) -> str:
        """Split that is evaluated; empty where its files are missing."""
        found = self._files(folder)
        return next((split for split in self.splits if split in found), "")

    def problems(self, folder: Path) -> Iterator[tuple[str, Problem]]:
        """Problems of all parts but the training part, and where each is; none where the files are missing."""
        for split, paths in self._files(folder).items():
            if split != "train":
                for path in paths:
                    for row in files.read(path, self.columns):
                        yield row.where, self._problem(row, path, is_labeled=False)

    def _files(self, folder: Path) -> dict[str, list[Path]]:
        folders = [path for name in self.folders if (path := folder / name).is_dir()]
        return files.find(folders, self.wanted, self.unwanted)

    def _read(self, paths: Sequence[Path]) -> list[Problem]:
        return [self._problem(row, path) for path in paths for row in files.read(path, self.columns)]

    def _problem(self, row: Row, path: Path, is_labeled: bool = True) -> Problem:
        name = Path(plain_name(path.name))
        subject = re.sub(r"_(dev|val|test)$", "", name.stem) if name.suffix.lower() == ".csv" else path.parent.name
        try:
            problem = self.problem(row.value, subject)
            if not is_labeled or 0 <= problem.gold < len(problem.choices):
                return problem
            what, found = "a record without its answer", "as the test parts of some sets are published"
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            what, found = f"this is not a record of {self.title}", f"{type(error).__name__}: {error}"
        raise InputError(what, where=row.where, found=found, expected=self.expected)

    def _examples(
        self, folder: Path, style: Style, found: Mapping[str, list[Path]], split: str, shots: int
    ) -> _Examples:
        if not shots:
            return _Examples(self.title, [])
        if not (style.startswith("olmes") and self.curated):
            chosen = next((split for split in self.examples if split in found), None)
            if chosen is None:
                what, where = f"the few-shot examples of {self.title} are missing", f"{folder}/{self.folders[0]}"
                raise InputError(what, where=where, expected=f"a part {' or '.join(self.examples)}, or --shots 0")
            drawn = None if self.first else Random(SEED)
            return _Examples(self.title, self._read(found[chosen]), drawn, chosen == split)
        path = folder / CURATED
        if not path.exists():
            what, expected = "the few-shot examples of OLMES are missing", "lists of records by set, or --shots 0"
            raise InputError(what, where=path, expected=expected)
        records = next(iter(files.read(path, ()))).value[self.curated]
        rows = [Row(value, f"{path}, {self.curated} {i}") for i, value in enumerate(records, 1)]
        return _Examples(self.title, [self._problem(row, path) for row in rows])


class _Examples:
    """Few-shot examples of a set.

    Args:
        title: of the set.
        pool: problems from which they are taken.
        drawn: draws them anew for each problem, as the harness does; the first ones of its subject without.
        has_own: whether a problem is among them, and left out.
    """

    def __init__(self, title: str, pool: Sequence[Problem], drawn: Random | None = None, has_own: bool = False) -> None:
        self.title, self.drawn, self.has_own = title, drawn, has_own
        self.pool: dict[str, list[Problem]] = {}
        for problem in pool:
            self.pool.setdefault(problem.subject if drawn is None else "", []).append(problem)

    def of(self, problem: Problem, shots: int) -> list[Problem]:
        """Examples of a problem."""
        if not shots:
            return []
        pool, count = self.pool.get(problem.subject, []), shots + self.has_own
        if len(pool) < count:
            found = f"{max(0, len(pool) - self.has_own)} {problem.subject}".strip()
            raise InputError(f"too few examples of {self.title} for the prompt", found=found, expected=shots)
        taken = pool[:count] if self.drawn is None else self.drawn.sample(pool, count)
        return [one for one in taken if not (self.has_own and one == problem)][:shots]
