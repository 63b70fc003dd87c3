"""Judging by a model: pairwise in both orders, and single ratings (MT-bench, Zheng et al. 2023, arXiv 2306.05685).

The prompts are our own; verdicts have MT-bench's form: [[A]], [[B]], [[C]] for a tie, [[7]] for a rating of 1 to 10.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from minillama.data.reading import read_records
from minillama.data.sources import valid
from minillama.errors import InputError
from minillama.files import parsing
from minillama.inference.chat import Messages
from minillama.inference.generate import Completion
from minillama.inference.sampling import Sampling

Ask = Callable[[Sequence[Messages], int, Sampling], list[Completion]]
"""Conversations, new tokens at most, sampling -> one completion each, as of `remote.Local` and `remote.Remote`."""
Answers = Sequence[Sequence[str]]
"""Per question one answer per turn."""
QUESTIONS = Path(__file__).with_name("questions.jsonl")
# as in MT-bench, but 0, not 0.7, for categories that it does not have
TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
VERDICT = {"pairwise": r"\[\[([ABC])\]\]", "single": r"\[\[(\d+(?:\.\d+)?)\]\]"}
COMPARE = (
    "You are an impartial judge. Two assistants, A and B, answered the same user. Decide which answers are more "
    "helpful, correct, relevant and clear. Neither the order in which they are shown nor their length may count. Give "
    "your reasons in a few sentences, and then the verdict on a line of its own: [[A]] if A is better, [[B]] if B is "
    "better, [[C]] if they are equally good."
)
RATE = (
    "You are an impartial judge. Rate how helpful, correct, relevant and clear an assistant's answer is, from 1 to 10. "
    "Its length may not count. Give your reasons in a few sentences, and then the rating on a line of its own: [[1]], "
    "[[2]] and so on up to [[10]]."
)


@dataclass(frozen=True)
class Question:
    """Question of one or more turns, with what a good answer would be, if that is known."""

    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    kind: str = ""


class Verdict(NamedTuple):
    """Verdict on a turn: `A`, `B` or `C` in the order that was shown, a rating, or None, see `verdict_of`."""

    key: str
    text: str
    value: str | None


def read_questions(path: Path = QUESTIONS) -> list[Question]:
    """Questions in the form of Vicuna (text), MT-bench (turns) or Ziya (task, kind, question, reference).

    Raises:
        InputError: a line that has none of these forms, or no line.
    """
    found = []
    for number, (value, where) in enumerate(((record.value, record.where) for record in valid(read_records(path))), 1):
        turns = value.get("turns") or [value.get("text") or value.get("question")]
        reference = value.get("reference") or []
        reference = [reference] if isinstance(reference, str) else reference
        if not (_are_texts(turns) and all(turns) and _are_texts(reference)):
            expected = "text (Vicuna), turns, a list (MT-bench), or question (Ziya); strings, as in a reference"
            raise InputError("this is not a question", where=where, found=json.dumps(value), expected=expected)
        category = str(value.get("category") or value.get("task") or "all")
        name, kind = str(value.get("question_id", number)), str(value.get("kind") or "")
        found.append(Question(name, category, tuple(turns), tuple(reference), kind))
    if not found:
        raise InputError("there is no question", where=path)
    if len({one.id for one in found}) < len(found):
        raise InputError("two questions have the same question_id", where=path)
    return found


def read_answers(path: Path, questions: Sequence[Question]) -> list[list[str]]:
    """Answers of a file in MT-bench's form (question_id, choices[0].turns), in the order of the questions.

    Raises:
        InputError: a line of another form, or one is missing.
    """
    known: dict[str, list[str]] = {}
    for record in valid(read_records(path)):
        try:
            name, turns = str(record.value["question_id"]), record.value["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError):
            name, turns = "", None
        if not _are_texts(turns):
            found, expected = json.dumps(record.value), "question_id, and choices[0].turns, a list of strings"
            raise InputError("this is not an answer", where=record.where, found=found, expected=expected)
        known[name] = turns
    for question in questions:
        if len(known.get(question.id, [])) < len(question.turns):
            raise InputError("an answer is missing", where=path, found=f"too few turns for question {question.id}")
    return [known[question.id] for question in questions]


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def read_reasons(path: Path, questions: Sequence[Question]) -> Counter[str]:
    """Finish reasons of the answers to the questions in a file, where it has them."""
    names, found = {question.id for question in questions}, Counter[str]()
    for record in valid(read_records(path)):
        with parsing(record.where, "this is not an answer"):
            if str(record.value["question_id"]) in names:
                found.update(map(str, record.value["choices"][0].get("reasons", ())))
    return found


def answer(ask: Ask, questions: Sequence[Question], max_new_tokens: int = 512) -> list[list[Completion]]:
    """Answers to each turn, the earlier ones in the conversation; temperatures by category as in MT-bench."""
    answers: list[list[Completion]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        by_heat: dict[float, list[int]] = {}
        for i, question in enumerate(questions):
            if turn < len(question.turns):
                by_heat.setdefault(TEMPERATURE.get(question.category, 0.0), []).append(i)
        for heat, rows in by_heat.items():
            asked = [_dialog(questions[i].turns, [one.text for one in answers[i]]) for i in rows]
            for i, one in zip(rows, ask(asked, max_new_tokens, Sampling(temperature=heat)), strict=True):
                answers[i].append(one)
    return answers


def _dialog(turns: Sequence[str], answers: Sequence[str]) -> Messages:
    """Messages up to the first turn without an answer."""
    said = [{"role": "user", "content": turn} for turn in turns]
    replies = [{"role": "assistant", "content": reply} for reply in answers]
    return [*chain(*zip(said, replies, strict=False)), said[len(answers)]]


def pairwise_prompts(questions: Sequence[Question], ours: Answers, theirs: Answers) -> dict[str, Messages]:
    """Prompts of every turn in both orders; the key is question/turn/order/hash of the prompt."""
    prompts: dict[str, Messages] = {}
    for question, a, b in zip(questions, ours, theirs, strict=True):
        for turn in range(len(question.turns)):
            for order, (first, second) in enumerate(((a, b), (b, a))):
                shown = {"Assistant A": first, "Assistant B": second}
                prompts |= _prompt(question, turn, shown, COMPARE, str(order))
    return prompts


def single_prompts(questions: Sequence[Question], answers: Answers, side: str) -> dict[str, Messages]:
    """Prompts for a rating of every turn; the key is question/turn/side/hash of the prompt."""
    prompts: dict[str, Messages] = {}
    for question, own in zip(questions, answers, strict=True):
        for turn in range(len(question.turns)):
            prompts |= _prompt(question, turn, {"Assistant": own}, RATE, side)
    return prompts


def _prompt(
    question: Question, turn: int, shown: Mapping[str, Sequence[str]], task: str, name: str
) -> dict[str, Messages]:
    parts = [task] + ["The conversation has several turns. Judge the answer to the last one."] * (turn > 0)
    if turn < len(question.reference):
        parts.append(f"<reference>\n{question.reference[turn]}\n</reference>")
    for who, answers in shown.items():
        turns = zip(question.turns[: turn + 1], answers, strict=False)
        said = "\n\n".join(f"User: {text}\n\n{who}: {reply}" for text, reply in turns)
        parts.append(f"<{who}>\n{said}\n</{who}>")
    text = "\n\n".join(parts)
    key = f"{question.id}/{turn}/{name}/{sha256(text.encode()).hexdigest()[:12]}"
    return {key: [{"role": "user", "content": text}]}


def ask_verdicts(ask: Ask, prompts: Mapping[str, Messages], max_new_tokens: int, mode: str) -> Iterator[Verdict]:
    """Verdicts by key, greedily, 16 at a time; see `verdict_of`."""
    asked = [*prompts.items()]
    for start in range(0, len(asked), 16):
        part = asked[start : start + 16]
        found = ask([prompt for _, prompt in part], max_new_tokens, Sampling(temperature=0))
        for (key, _), one in zip(part, found, strict=True):
            yield Verdict(key, one.text, verdict_of(one.text, mode))


def verdict_of(text: str, mode: str) -> str | None:
    """Verdict of a reply; None without any, and with several, as when a judge repeats what it was told."""
    values = {*re.findall(VERDICT[mode], text)}
    return values.pop() if len(values) == 1 else None
