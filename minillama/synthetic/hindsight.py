"""Chain of hindsight, and fine-tuning on human edits: conversations from answers that people compared or corrected."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from minillama.data.conversations import read_record
from minillama.data.permutation import derive_keys
from minillama.data.preferences import is_preference, read_preference
from minillama.data.prompts import answered
from minillama.data.reading import Record
from minillama.errors import InputError
from minillama.synthetic.wording import Language, wording
from minillama.tokenizer.conversation import Conversation

Form = Literal["good", "bad", "rising", "falling", "compare"]
FORMS: tuple[Form, ...] = ("good", "bad", "rising", "falling", "compare")
Turns = list[dict[str, Any]]


def turns(conversation: Conversation) -> Turns:
    """Messages as JSON, inputs behind their instructions."""
    return [{"role": message.role, "content": message.full_content} for message in conversation.messages]


def chains(
    records: Sequence[Record], first: int, seed: int, language: Language = "en", forms: Sequence[Form] = FORMS
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Chain of hindsight (Liu et al. 2023, arXiv 2302.02676; Ziya's COHFT) of ranked answers, one form drawn for each.

    good, bad: the best or worst answer behind words that call it so. rising, falling: all answers from the worst to the
    best or back, each behind such words. compare: two answers in the prompt, and which one is better. The words are
    part of the questions, so that their weight is 0, and that of every answer is 1; words of equal answers say so.

    Args:
        records: preferences, or `answers` from the best to the worst, or in any order with `scores`, beside a prompt.
        first: number of the first record.
        seed: of what is drawn.
        language: of the words.
        forms: that may be drawn.

    Raises:
        InputError: a record without two answers.
    """
    words, lines = wording(language), []
    for number, record in enumerate(records, first):
        chance = random.Random(derive_keys("hindsight", seed, number)[0])
        question, ranked = _ranked(record)
        form = "alike" if ranked[0][1] == ranked[-1][1] else chance.choice(forms)
        best, worst = ranked[0][0], ranked[-1][0]
        if form == "alike":
            chain = [(chance.choice(words["alike"]), chance.choice((best, worst)))]
        elif form == "compare":
            flip = chance.random() < 0.5
            a, b = (worst, best) if flip else (best, worst)
            asked = words["compare"].format(question=question[-1]["content"], a=a, b=b)
            question, chain = [*question[:-1], {"role": "user", "content": asked}], [("", words["verdicts"][flip])]
        elif form in ("good", "bad"):
            chain = [(chance.choice(words[form]), best if form == "good" else worst)]
        else:
            order, (start, then) = (
                (ranked, ("good", "worse")) if form == "falling" else (ranked[::-1], ("bad", "better"))
            )
            kinds = [start, *("alike" if one[1] == other[1] else then for one, other in pairwise(order))]
            chain = [(chance.choice(words[kind]), text) for kind, (text, _) in zip(kinds, order, strict=True)]
        messages = [dict(message, **({"weight": 0} if message["role"] == "assistant" else {})) for message in question]
        for place, (phrase, answer) in enumerate(chain):
            if place == 0:
                messages[-1]["content"] = "\n\n".join(filter(None, (messages[-1]["content"], phrase)))
            else:
                messages.append({"role": "user", "content": phrase})
            messages.append({"role": "assistant", "content": answer})
        lines.append({"messages": messages, "form": form})
    return lines, {}


def edits(records: Sequence[Record], pairs: bool = False) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Fine-tuning records of human edits (Ziya's HFFT): the corrected answer in place of the model's.

    With `feedback`, what a person said of it, the model's answer stays with weight 0, the feedback is the next message
    of the user, and the correction answers it.

    Args:
        records: conversations with a `correction` of their last answer, perhaps with `feedback`.
        pairs: preferences of the correction over the answer instead.

    Raises:
        InputError: a record without a correction.
    """
    lines = []
    left_out = {"without a change": 0}
    for record in records:
        fields = record.value
        correction, feedback = fields.get("correction"), fields.get("feedback")
        if not isinstance(correction, str) or not correction.strip() or not isinstance(feedback, str | None):
            expected = "a conversation with a correction, a string, and perhaps feedback"
            raise InputError("no correction", where=record.where, found=", ".join(fields), expected=expected)
        *asked, answer = turns(read_record(record)[0])
        corrected = {"role": "assistant", "content": correction}
        earlier = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in asked]
        if pairs and correction == answer["content"]:
            left_out["without a change"] += 1
        elif pairs:
            lines.append({"prompt": asked, "chosen": [corrected], "rejected": [answer]})
        elif feedback:
            lines.append(
                {"messages": [*earlier, {**answer, "weight": 0}, {"role": "user", "content": feedback}, corrected]}
            )
        else:
            lines.append({"messages": [*earlier, corrected]})
    return lines, left_out


def _ranked(record: Record) -> tuple[Turns, list[tuple[str, float]]]:
    """Messages up to a question, and its answers with falling scores."""
    fields: Mapping[str, Any] = record.value
    if "answers" not in fields and is_preference(fields):
        sides = read_preference(record).sides
        if len(sides) == 2:
            return turns(sides[0])[:-1], [(side.messages[-1].content, -i) for i, side in enumerate(sides)]
    answers, scores = fields.get("answers"), fields.get("scores")
    if isinstance(answers, list) and len(answers) > 1 and all(isinstance(a, str) and a.strip() for a in answers):
        rest = {key: value for key, value in fields.items() if key not in ("answers", "scores")}
        values = range(0, -len(answers), -1) if scores is None else scores if isinstance(scores, list) else []
        if len(values) == len(answers) and all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            order = sorted(range(len(answers)), key=lambda i: -values[i])
            return turns(read_record(answered(Record(rest, record.where)))[0])[:-1], [
                (answers[i], values[i]) for i in order
            ]
    expected = "a preference with chosen and rejected, or answers, at least two strings, perhaps with as many scores"
    found = ", ".join(fields) + (f"; scores {scores!r}"[:80] if scores is not None else "") or "no field"
    raise InputError("no answers to compare", where=record.where, found=found, expected=expected)
