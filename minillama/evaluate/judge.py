"""Judging by a model (MT-bench, Zheng et al. 2023, arXiv 2306.05685): pairwise in both orders, and single ratings.

The prompts are our own; verdicts have MT-bench's form: [[A]], [[B]], [[C]] for a tie, [[7]] for a rating of 1 to 10.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minillama.data.reading import BadText, read_records
from minillama.errors import InputError
from minillama.evaluate.comparison import Estimate, estimate, wilson
from minillama.inference.chat import ChatPrompts, Messages
from minillama.inference.engine import Engine
from minillama.inference.generate import Completion, generate
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer

Ask = Callable[[Sequence[Messages], int, Sampling], list[Completion]]
"""Conversations, new tokens at most, sampling -> one completion each."""
QUESTIONS = Path(__file__).with_name("questions.jsonl")
TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # others 0, as in MT-bench
CLOSE = 0.1  # ratings that differ by this are a tie
_COMPARE = (
    "You are an impartial judge. Two assistants, A and B, answered the same user. Decide which answers are more "
    "helpful, correct, relevant and clear. Neither the order in which they are shown nor their length may count. Give "
    "your reasons in a few sentences, and then the verdict on a line of its own: [[A]] if A is better, [[B]] if B is "
    "better, [[C]] if they are equally good."
)
_RATE = (
    "You are an impartial judge. Rate how helpful, correct, relevant and clear an assistant's answer is, from 1 to 10. "
    "Its length may not count. Give your reasons in a few sentences, and then the rating on a line of its own, in this "
    "form: [[5]]"
)


@dataclass(frozen=True)
class Question:
    """Question of one or more turns, with what a good answer would be, if that is known."""

    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """Verdict on a turn: `A`, `B` or `C` in the order that was shown, a rating, or None if there was none."""

    key: str
    text: str
    value: str | None


Outcome = Literal["A", "B", "tie", "disagree", "error"]


class LocalModel:
    """A local model that is asked by its chat template; a conversation that fills its context gets no answer."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: str = "", rows: int = 16) -> None:
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.encode = ChatPrompts(tokenizer, template)
        model.stop_ids |= self.encode.stop_ids

    def __call__(self, prompts: Sequence[Messages], max_new_tokens: int, sampling: Sampling) -> list[Completion]:
        """See `Ask`."""
        ids = [self.encode(prompt) for prompt in prompts]
        fits = [i for i, one in enumerate(ids) if len(one) < self.model.config.max_seq_len - 2]
        found = [Completion("", (), "context")] * len(ids)
        engine, asked = Engine(self.model, self.rows, None), [ids[i] for i in fits]
        for i, one in zip(
            fits, generate(self.model, self.tokenizer, asked, max_new_tokens, sampling, engine=engine), strict=True
        ):
            found[i] = one
        return found


def read_questions(path: Path = QUESTIONS) -> list[Question]:
    """Questions in the form of Vicuna (text), MT-bench (turns) or Ziya (task, kind, question, reference).

    Raises:
        InputError: a line that has none of these forms.
    """
    found = []
    for number, record in enumerate(read_records(path), 1):
        if isinstance(record, BadText):
            raise InputError(record.what, where=record.where, found=record.found, expected=record.expected)
        value = record.value
        turns = value.get("turns") or [value.get("text") or value.get("question")]
        reference = value.get("reference") or []
        reference = [reference] if isinstance(reference, str) else reference
        if not all(isinstance(turn, str) and turn for turn in turns):
            expected = "text (Vicuna), turns (MT-bench) or question (Ziya)"
            raise InputError("this is not a question", where=record.where, found=", ".join(value), expected=expected)
        category = str(value.get("category") or value.get("task") or "all")
        found.append(Question(str(value.get("question_id", number)), category, tuple(turns), tuple(reference)))
    if not found:
        raise InputError("there is no question", where=path)
    return found


def read_answers(path: Path, questions: Sequence[Question]) -> list[list[str]]:
    """Answers of a file in MT-bench's form (question_id, choices[0].turns), in the order of the questions.

    Raises:
        InputError: one is missing.
    """
    known: dict[str, list[str]] = {}
    for record in read_records(path):
        try:
            if isinstance(record, BadText):
                raise record
            known[str(record.value["question_id"])] = record.value["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError):
            raise InputError(
                "this is not an answer", where=record.where, expected="question_id, choices[0].turns"
            ) from None
    for question in questions:
        if len(known.get(question.id, [])) < len(question.turns):
            raise InputError("an answer is missing", where=path, found=f"none to every turn of question {question.id}")
    return [known[question.id] for question in questions]


def answer(ask: Ask, questions: Sequence[Question], max_new_tokens: int = 512, seed: int = 0) -> list[list[str]]:
    """Answers to each turn, the earlier ones in the conversation; temperatures by category as in MT-bench."""
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        by_heat: dict[float, list[int]] = {}
        for i, question in enumerate(questions):
            if turn < len(question.turns):
                by_heat.setdefault(TEMPERATURE.get(question.category, 0.0), []).append(i)
        for heat, rows in by_heat.items():
            asked = [_dialog(questions[i].turns, answers[i]) for i in rows]
            found = ask(asked, max_new_tokens, Sampling(temperature=heat, seed=seed))
            for i, one in zip(rows, found, strict=True):
                answers[i].append(one.text)
    return answers


def _dialog(turns: Sequence[str], answers: Sequence[str]) -> Messages:
    """Messages up to the first turn without an answer."""
    messages = []
    for said, reply in zip(turns, answers, strict=False):
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
    return [*messages, {"role": "user", "content": turns[len(answers)]}]


def _shown(question: Question, turn: int, answers: Sequence[str], name: str) -> str:
    parts = [
        f"User: {said}\n\n{name}: {reply}" for said, reply in zip(question.turns[: turn + 1], answers, strict=False)
    ]
    return f"<{name}>\n" + "\n\n".join(parts) + f"\n</{name}>"


def _prompt(question: Question, turn: int, shown: Sequence[tuple[str, Sequence[str]]], task: str) -> Messages:
    parts = [task]
    if turn:
        parts.append("The conversation has several turns. Judge the answer to the last one.")
    if turn < len(question.reference):
        parts.append(f"<reference>\n{question.reference[turn]}\n</reference>")
    parts += [_shown(question, turn, answers, name) for name, answers in shown]
    return [{"role": "user", "content": "\n\n".join(parts)}]


def ask_verdicts(
    ask: Ask, prompts: Mapping[str, Messages], known: Mapping[str, Verdict], max_new_tokens: int, pattern: str
) -> Iterable[Verdict]:
    """Verdicts by key, greedily, in batches; those that are known are not asked again."""
    left = [(key, prompt) for key, prompt in prompts.items() if key not in known]
    yield from (known[key] for key in prompts if key in known)
    for start in range(0, len(left), 16):
        part = left[start : start + 16]
        for (key, _), one in zip(part, ask([p for _, p in part], max_new_tokens, Sampling(temperature=0)), strict=True):
            found = re.findall(pattern, one.text)
            yield Verdict(key, one.text, found[-1] if found else None)


PAIRWISE, SINGLE = r"\[\[([ABC])\]\]", r"\[\[(\d+(?:\.\d+)?)\]\]"


def pairwise_prompts(
    questions: Sequence[Question], ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]
) -> dict[str, Messages]:
    """Prompts of every turn in both orders; the key is question, turn, order and a hash of the prompt."""
    prompts = {}
    for question, a, b in zip(questions, ours, theirs, strict=True):
        for turn in range(len(question.turns)):
            for order, (first, second) in enumerate(((a, b), (b, a))):
                prompt = _prompt(question, turn, (("Assistant A", first), ("Assistant B", second)), _COMPARE)
                prompts[_key(f"{question.id}/{turn}/{order}", prompt)] = prompt
    return prompts


def single_prompts(questions: Sequence[Question], answers: Sequence[Sequence[str]], name: str) -> dict[str, Messages]:
    """Prompts for a rating of every turn."""
    prompts = {}
    for question, own in zip(questions, answers, strict=True):
        for turn in range(len(question.turns)):
            prompt = _prompt(question, turn, (("Assistant", own),), _RATE)
            prompts[_key(f"{question.id}/{turn}/{name}", prompt)] = prompt
    return prompts


def _key(name: str, prompt: Messages) -> str:
    return f"{name}/{sha256(str(prompt).encode()).hexdigest()[:12]}"


def outcome(first: str | None, second: str | None) -> Outcome:
    """Outcome of both orders, A being what was shown first in the first: a win counts only if both agree."""
    if first is None or second is None:
        return "error"
    second = {"A": "B", "B": "A", "C": "C"}[second]
    if first != second:
        return "disagree"
    return "tie" if first == "C" else "A" if first == "A" else "B"


class Tally(NamedTuple):
    """Counts of a category, and the biases of the judge in it.

    Attributes:
        rate: (wins of A + half of all ties) / n, a disagreement being a tie, with its Wilson interval; without errors.
        first: share of verdicts for what was shown first, of those that were no tie, and its interval.
        longer: share of verdicts for the longer answer, likewise.
    """

    wins: int
    losses: int
    ties: int
    disagreements: int
    errors: int
    rate: tuple[float, float, float]
    first: tuple[float, float, float, int]
    longer: tuple[float, float, float, int]


def tally(pairs: Sequence[tuple[str | None, str | None, int, int]]) -> Tally:
    """Tally of turns: the verdicts of both orders, and the lengths of the answers of A and B."""
    found = [outcome(first, second) for first, second, _, _ in pairs]
    count = {name: found.count(name) for name in ("A", "B", "tie", "disagree", "error")}
    n = len(found) - count["error"]
    rate = (count["A"] + (count["tie"] + count["disagree"]) / 2) / n if n else 0.5
    first_shown, longer = [], []
    for one, other, a, b in pairs:
        for value, shown, hidden in ((one, a, b), (other, b, a)):
            if value in ("A", "B"):
                first_shown.append(value == "A")
                if shown != hidden:
                    longer.append((value == "A") == (shown > hidden))
    return Tally(
        count["A"],
        count["B"],
        count["tie"],
        count["disagree"],
        count["error"],
        (rate, *wilson(rate, n)),
        _share(first_shown),
        _share(longer),
    )


def _share(values: Sequence[bool]) -> tuple[float, float, float, int]:
    share = sum(values) / len(values) if values else 0.5
    return share, *wilson(share, len(values)), len(values)


def rating(values: Sequence[str | None]) -> tuple[Estimate | None, int]:
    """Mean rating with its standard error, and the number of answers without one."""
    numbers = [float(value) for value in values if value is not None and 1 <= float(value) <= 10]
    return (estimate(numbers) if numbers else None), len(values) - len(numbers)


def summarize(
    questions: Sequence[Question],
    ours: Sequence[Sequence[str]],
    theirs: Sequence[Sequence[str]],
    verdicts: Mapping[str, Verdict],
) -> dict[str, Tally]:
    """Tallies by category, by turn where there are several, and of all."""
    by_place = {key.rsplit("/", 1)[0]: verdict.value for key, verdict in verdicts.items()}
    groups: dict[str, list[Any]] = {}
    turns = max(len(question.turns) for question in questions)
    for question, a, b in zip(questions, ours, theirs, strict=True):
        for turn in range(len(question.turns)):
            pair = (*(by_place.get(f"{question.id}/{turn}/{order}") for order in (0, 1)), len(a[turn]), len(b[turn]))
            for name in (question.category, *[f"turn {turn + 1}"] * (turns > 1), "all"):
                groups.setdefault(name, []).append(pair)
    last = [name for name in groups if name.startswith("turn ")] + ["all"]
    order = [name for name in groups if name not in last] + last
    return {name: tally(groups[name]) for name in order}
